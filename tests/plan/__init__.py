"""Tests of core/plan/."""
