"""What processes that tests fork have imported: `on_ranks` preloads it, and what it made is never searched again."""

import gc

import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor

import moe_engine.growth.transaction
import moe_engine.run.training  # noqa: F401

gc.collect()
gc.freeze()  # growths, which look for optimizers among all objects, need not look here
