"""Plain `nn.Module`s: a CLIP-style ViT, adapters, a visual neck and a LLaMA, put together by `build.build_model`.

Imports: errors, files, families, schema, batch, config, ops.
"""
