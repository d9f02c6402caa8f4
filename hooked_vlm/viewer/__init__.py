"""The viewer: one HTML page on which a model's reading of a picture is explored without a server.

Everything that the page shows is computed before: attention (`attention_maps`), logit lens
(`logit_lens`), the effect of patches (`Sweep`) and probe maps.  `measured` computes it, `view`
holds it, `page` writes it.
"""
