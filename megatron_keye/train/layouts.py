"""Names of layouts: `tp2cp2sp` is tensor parallel 2, context parallel 2, sequence parallel; see `parse_layout`."""

import re
from dataclasses import dataclass

from megatron_keye.config.schema import ParallelConfig, RunConfig
from megatron_keye.errors import SettingsError

AXES = ("tp", "cp", "pp", "vp", "dp")
SWITCHES = ("sp", "recompute", "reencode")


@dataclass(frozen=True)
class Layout:
    """A layout to verify: axis sizes, and what else is switched on in it."""

    name: str
    parallel: ParallelConfig
    num_replicas: int
    recompute: bool
    """Recompute whole decoder layers and ViT layers."""
    reencode: bool
    """Run the encoder's forward again in phase 3."""

    @property
    def world_size(self) -> int:
        return self.parallel.tp * self.parallel.cp * self.parallel.pp * self.num_replicas

    def apply(self, config: RunConfig) -> RunConfig:
        model = config.model
        if self.recompute:
            decoder = model.decoder.model_copy(update={"recompute": "full"})
            vision = model.vision.model_copy(update={"recompute": True})
            model = model.model_copy(update={"decoder": decoder, "vision": vision})
        activations = "recompute" if self.reencode else config.encode.activations
        encode = config.encode.model_copy(update={"activations": activations})
        return config.model_copy(update={"model": model, "parallel": self.parallel, "encode": encode})


def parse_layout(name: str) -> Layout:
    """`one`, or any of tpN cpN ppN vpN dpN sp recompute reencode, in any order, run together. Raises SettingsError."""
    sizes = dict.fromkeys(AXES, 1)
    switches = set()
    rest = "" if name == "one" else name
    while rest:
        match = re.match(rf"({'|'.join(AXES)})(\d+)|({'|'.join(SWITCHES)})", rest)
        if match is None:
            raise SettingsError(
                f"Layout {name!r}: cannot read {rest!r}; expected axes ({', '.join(a + 'N' for a in AXES)}) and "
                f"switches ({', '.join(SWITCHES)}), as in tp2cp2sp, or 'one' for a single process."
            )
        if match[3]:
            switches.add(match[3])
        else:
            sizes[match[1]] = int(match[2])
        rest = rest[match.end() :]
    parallel = ParallelConfig(
        tp=sizes["tp"], cp=sizes["cp"], pp=sizes["pp"], vp=sizes["vp"], sequence_parallel="sp" in switches
    )
    return Layout(name, parallel, sizes["dp"], "recompute" in switches, "reencode" in switches)
