import torch

# Small tensors gain nothing from threads, and lose much where tests share their cores with other work.
torch.set_num_threads(1)
