"""The converters that ship with loraformat, one module or package per format."""
