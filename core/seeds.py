"""Random draws: a generator for each purpose, and the state of the global ones."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import torch


def generator(seed: int, name: str) -> torch.Generator:
    """The random generator of one named purpose ("data order", ...) of a run."""
    digest = sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, random and numpy; restore their old states at the end."""
    before = random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # for code that draws from numpy's global generator
    try:
        yield
    finally:
        set_random_state(before)


def random_state() -> dict[str, Any]:
    """The states of torch, random and numpy."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda_state in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
