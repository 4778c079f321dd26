"""The bundle format of ``spec/loraformat-1.1.md``: an NF4 base, adapters, a manifest.

Read `manifest` and `manifest_rules`, then `reader` (opening) with `rules`, `converter` (reading and
writing as every converter does), `update` (adapters in and out) and `integrity` (hashes).
"""
