import gzip
from importlib import resources

import attrs
import numpy as np
import torch

from moe_engine import hookimpl, option
from moe_engine.tasks import image_task, model_option, shuffled_split


@attrs.define(eq=False)
class Digits:
    """1797 handwritten digits of 8 x 8 pixels: the default task.

    Classify pixels of 0 to 16 into 10 classes; the package contains the data. One fifth, the same for every seed, is
    for testing.

    Source: Alpaydin and Kaynak, 1998 (Optical Recognition of Handwritten Digits, test set; UCI Machine Learning
    Repository, doi 10.24432/C50P49, CC BY 4.0), as the file that scikit-learn ships.
    """

    model: str = model_option()
    dim: int = option(64, help="width of the model; unused by model=direct", min=1)
    hidden: int = option(64, help="hidden width of an expert", min=1)

    @hookimpl
    def moe_task(self, spec):
        packed = resources.files(__package__).joinpath("digits.csv.gz").read_bytes()
        rows = torch.from_numpy(np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",")).long()
        # the split is part of the task: it must not change with a run's seed
        train, test = shuffled_split((rows[:, :-1].to(torch.uint8), rows[:, -1]), 0.2, 0, "digits split")
        return image_task(train, test, 10, self.dim, self.hidden, 1, self.model)
