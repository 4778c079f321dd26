"""The verbs, one package or module each, named as the verb.

The function of a verb's name is the public one, ``loraformat.VERB``; the command line reads its
signature and docstring. What several verbs share: `arguments`, `opening` (inputs by name),
`encoding` (types of tensors), `deltas` (factors), `adapter_output` (writing adapters), `plots`
(picture files).
"""
