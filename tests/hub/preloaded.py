"""What each command of the tests would import again; none of it reads the environment."""

import fsspec
import httpx2
import safetensors.torch
import torch
import yaml

from loraformat import plugins
from loraformat.ops import describe, verify
from loraformat.ops.sharing import pull, push

__all__ = ["describe", "fsspec", "httpx2", "pull", "push", "safetensors", "torch", "verify", "yaml"]

plugins.all_converters()
