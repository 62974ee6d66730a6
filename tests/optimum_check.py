"""What `make test-optimum` runs: an exported folder in an environment with Optimum and an old transformers.

python tests/optimum_check.py export FOLDER   in the package's own environment
python tests/optimum_check.py run FOLDER      in Optimum's
"""

import json
import sys
from pathlib import Path

import torch

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]
NEW = 12


def export(folder):
    """A tiny transformed model as a graph, and the tokens that torch generates with it."""
    import zoo

    import rotatekv_fx

    model = zoo.packed("llama", "centered", 1, window=4, sinks=4)
    rotatekv_fx.export_onnx(model, folder)
    ids = torch.tensor(PROMPTS)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    (folder / "expected.json").write_text(json.dumps(tokens.tolist()))


def run(folder):
    """Optimum's own class opens the graph and refuses its inputs; ours generates torch's tokens."""
    import transformers
    from optimum.onnxruntime import ORTModelForCausalLM

    from rotatekv_fx.export.optimum import PackedModelForCausalLM

    ids = torch.tensor(PROMPTS)
    mask = torch.ones_like(ids)
    plain = ORTModelForCausalLM.from_pretrained(folder)
    try:
        plain(input_ids=ids, attention_mask=mask)
    except ValueError as error:
        print(f"ORTModelForCausalLM: {error}")
    else:
        raise AssertionError("ORTModelForCausalLM ran the graph; say so in the README")
    packed = PackedModelForCausalLM.from_pretrained(folder)
    found = packed.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    expected = json.loads((folder / "expected.json").read_text())
    assert found.tolist() == expected, (found.tolist(), expected)
    print(f"PackedModelForCausalLM: {NEW} tokens equal torch's (transformers {transformers.__version__}).")


if __name__ == "__main__":
    {"export": export, "run": run}[sys.argv[1]](Path(sys.argv[2]))
