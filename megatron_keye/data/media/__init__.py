"""Bytes of an image or video to uint8 patches.

1. `rules`, `resize`: the numbers, and the sizes that follow from them.
2. `image`, `video`: files to pixels, exactly or with a DataError; `bitstream`, `groups`: which packets of a video that takes.
3. `slow_fast` (Keye-VL-1.5), `preview_video` (Keye-VL-8B-Preview): how many frames, at which size.
4. `sampling`, `frame_tags`: which frames, and which of them are slow. For making an index alone, as they need torch.
5. `resample`, by `weights` and `passes`: pixels to their size; `torch_resize` where only torch gives the right bytes.
6. `patches`: pixels in the order of the ViT's weights.
"""
