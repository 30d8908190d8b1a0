"""Make a folder for the Hugging Face hub of a packed model, and upload it where --push is given.

    python examples/upload.py my-2-bit-model hub-ready me/my-2-bit-model --base Qwen/Qwen3-0.6B --license apache-2.0

Without --push nothing leaves your machine: look at the folder, remove it, log in by `hf auth login`, and run the same
line with --push. The folder is a new one, so that nothing is published that lay beside the model (checkpoints, notes),
and the model is read first, so that a damaged file is refused and not uploaded.
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer

from lcqat_min import __version__
from lcqat_min.packing import load_packed, save_packed

CARD = """---
license: {license}
base_model: {base}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [2-bit, lc-qat, lcqat-min]
---

{readme}
Made from `{base}` by lcqat-min {version}, which is needed to load it. Linear layers are quantized; embeddings, norms
and the output head are not.
"""


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("packed", type=Path, help="a folder that save_packed wrote, with a tokenizer")
    options.add_argument("out", type=Path, help="a folder that does not exist yet")
    options.add_argument("repo", help="where it goes on the hub: owner/name")
    options.add_argument("--base", required=True, help="name on the hub of the model that it was made from")
    options.add_argument("--license", required=True, help="of that model, which holds for yours, too")
    options.add_argument("--push", action="store_true", help="upload the folder to a private repository")
    args = options.parse_args(argv)
    validate_repo_id(args.repo)
    if args.out.exists():
        options.error(f"{args.out} exists already: give a new folder, or remove it")
    api = HfApi()
    if args.push:
        api.whoami()  # who is not logged in learns it now

    tokenizer = AutoTokenizer.from_pretrained(args.packed, trust_remote_code=False)
    save_packed(load_packed(args.packed), args.out)
    tokenizer.save_pretrained(args.out)
    file = args.out / "README.md"
    readme = file.read_text(encoding="utf-8").replace('"this folder"', f'"{args.repo}"')
    file.write_text(CARD.format(readme=readme, version=__version__, **vars(args)), encoding="utf-8")
    print(f"ready for the hub: {args.out}")
    if args.push:
        api.create_repo(args.repo, private=True, exist_ok=True)
        print(api.upload_folder(repo_id=args.repo, folder_path=args.out))


if __name__ == "__main__":
    main()
