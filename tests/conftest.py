from __future__ import annotations

import hypothesis
import torch

# Two threads at most: the suite's matrices are small, and machines that run it are often shared.
torch.set_num_threads(min(2, torch.get_num_threads()))

# Examples are derived from the test itself, so that a run says the same thing twice; time limits are pytest-timeout's.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("default")
