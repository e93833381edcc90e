"""Bytes of an image or video to uint8 patches.

1. `rules`, `resize`: the numbers, and the sizes that follow from them.
2. `image`, `video`: files to pixels, exactly or with a DataError.
3. `slow_fast` (Keye-VL-1.5), `preview_video` (Keye-VL-8B-Preview): which frames, at which size.
4. `patches`: pixels in the order of the ViT's weights.
"""
