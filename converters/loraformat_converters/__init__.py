"""The converters that come with loraformat: one room per format, none knows another."""
