"""What touches a device: processes, sampling, scoring, learning, checkpoints. Knows no algorithm."""

import os

import torch

if not torch.cuda.is_available():
    # Said before DeepSpeed is first imported, which otherwise warns that it found nothing better.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
