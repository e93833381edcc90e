"""Make the demo set: pictures, H.264 clips and texts with exact answers, a small tokenizer, and shards to train on.

    python data_tools/make_demo_data.py data/demo
    python data_tools/make_demo_data.py data/demo --preview sheet.png     # and draw a contact sheet of the held-out part

A finished set made from the same arguments is left as it is.
"""

import argparse
import sys
from pathlib import Path

from demo.build import build
from demo.preview import write_contact_sheet

from megatron_keye.errors import KeyeError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other examples (default %(default)s)")
    parser.add_argument("--train", type=int, default=3000, help="training examples (default %(default)s)")
    parser.add_argument("--valid", type=int, default=300, help="held-out examples (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and encode (default %(default)s)")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="also draw a contact sheet of held-out examples")
    arguments = parser.parse_args()
    try:
        made = build(arguments.out, {"train": arguments.train, "valid": arguments.valid}, arguments.seed, arguments.workers)
    except KeyeError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: {'made' if made else 'already complete'}")
    if arguments.preview:
        write_contact_sheet(arguments.out / "valid.jsonl", arguments.preview)
        print(f"{arguments.preview}: contact sheet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
