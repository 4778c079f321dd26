"""The package's version; the format's is `loraformat.bundle.manifest.FORMAT_VERSION`."""

__all__ = ["__version__"]

__version__ = "0.1.0"
