"""The verbs, one package or module each, named as the verb.

What several verbs share: `opening` (inputs by name), `encoding` (types of tensors),
`deltas` (factors), `adapter_output` (writing adapters), `plots` (picture files).
"""
