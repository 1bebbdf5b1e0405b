"""Tests of core/parallel/."""
