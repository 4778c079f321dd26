"""The converters that come with loraformat pass the kit that outsiders use."""

from loraformat_converters import bitsandbytes, safetensors

from loraformat.bundle import converter as bundle
from loraformat.testing import ConverterContract


class TestBundle(ConverterContract):
    converter = bundle.CONVERTER


class TestSafetensors(ConverterContract):
    converter = safetensors.CONVERTER


class TestBitsandbytes(ConverterContract):
    converter = bitsandbytes.CONVERTER
