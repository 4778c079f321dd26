"""What each command of the tests would import again; none of it reads the environment."""

import fsspec
import httpx2
import safetensors.torch
import torch
import yaml

from loraformat import plugins
from loraformat.ops import verify
from loraformat.ops.info import model as describe
from loraformat.ops.pull import pull
from loraformat.ops.push import push

__all__ = ["describe", "fsspec", "httpx2", "pull", "push", "safetensors", "torch", "verify", "yaml"]

plugins.all_converters()
