"""The pipelines of NVIDIA DALI. Importing this needs the package, which is an extra (`pip install 'megatron_keye[dali]'`)."""

import numpy as np
from nvidia import dali
from nvidia.dali import fn, types
from nvidia.dali.backend import GetCUDADeviceCount
from nvidia.dali.data_node import DataNode

from megatron_keye.data.media.dali import ImagePipeline, VideoPipeline


class DaliBackend:
    """`dali.Backend`. `device` is the number of the GPU to use, where there is any."""

    def __init__(self, device: int):
        self.has_gpu = GetCUDADeviceCount() > 0
        self.name = f"dali-{dali.__version__}-{'gpu' if self.has_gpu else 'cpu'}"
        self._device_id = device if self.has_gpu else None
        self._operators = "mixed" if self.has_gpu else "cpu"

    def open_images(self) -> ImagePipeline:
        # One engine and the CPU's upsampling, so that GPUs differ little; EXIF orientation is not applied, as by the other decoder.
        on_gpu = {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True} if self.has_gpu else {}
        blob = fn.external_source(name="blob", ndim=1, dtype=types.UINT8)
        pipeline = self._pipeline(
            fn.decoders.image(blob, device=self._operators, output_type=types.RGB, adjust_orientation=False, **on_gpu)
        )
        return lambda blob: _run(pipeline, blob=_bytes(blob))

    def open_videos(self) -> VideoPipeline:
        blob = fn.external_source(name="blob", ndim=1, dtype=types.UINT8)
        frames = fn.external_source(name="frames", ndim=1, dtype=types.INT32)
        pipeline = self._pipeline(fn.decoders.video(blob, frames=frames, device=self._operators, pad_mode="none"))
        return lambda blob, indices: _run(pipeline, blob=_bytes(blob), frames=np.array(indices, np.int32))

    def _pipeline(self, output: DataNode) -> dali.Pipeline:
        """Of one medium at a time."""
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        pipeline.set_outputs(output)
        pipeline.build()
        return pipeline


def _run(pipeline: dali.Pipeline, **inputs: np.ndarray) -> np.ndarray:
    for name, value in inputs.items():
        pipeline.feed_input(name, [value])
    (pixels,) = pipeline.run()
    return np.array(pixels.as_cpu().at(0))


def _bytes(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, np.uint8)
