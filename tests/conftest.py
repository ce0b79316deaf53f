"""For all tests: one thread, because on a busy machine threads that wait for each other are many times slower."""

import torch

torch.set_num_threads(1)
