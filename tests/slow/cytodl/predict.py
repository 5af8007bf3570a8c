"""Let cyto-dl predict; runs in its environment: python predict.py CASES.json

Each case is a dictionary: the bundle's folder, a checkpoint, an OME-TIFF, a channel,
patch, overlap, method (None for logits) and the folder for the result. The
experiment is the bundle's own train_config.yaml, as the napari plugin loads it.
"""

import json
import os
import sys
from pathlib import Path

# On processors with matrix units for bfloat16 some float32 layers are computed in bfloat16, and
# logits are 0.02 off. It is read when torch first uses oneDNN.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

import torch
from omegaconf import OmegaConf, open_dict


def predict(case):
    from cyto_dl.api.model import CytoDLModel

    out = Path(case["out"])
    listed = out / "listed"
    listed.mkdir(parents=True)
    (listed / "predict.csv").write_text(f"raw\n{case['image']}\n")
    model = CytoDLModel()
    model.load_config_from_file(str(Path(case["bundle"], "train_config.yaml")))
    changes = {
        "train": False,
        "task_name": "predict",
        "paths.output_dir": str(out),
        "paths.work_dir": str(out),
        "data.path": str(listed),
        "data.columns": ["raw"],
        "data.cache_dir": None,
        "data.num_workers": 0,
        "data._aux.patch_shape": case["patch"],
        "model._aux.overlap": case["overlap"],
        "input_channel": case["channel"],
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "checkpoint.ckpt_path": case["checkpoint"],
        "checkpoint.weights_only": False,
        "model.task_heads.seg.postprocess.prediction": {
            "_target_": "cyto_dl.models.im2im.utils.postprocessing.AutoThreshold",
            "method": case["method"],
        },
        "callbacks": {
            "saving": {
                "_target_": "cyto_dl.callbacks.ImageSaver",
                "save_dir": str(out),
                "stages": ["predict"],
            }
        },
    }
    with open_dict(model.cfg):
        for key, value in changes.items():
            OmegaConf.update(model.cfg, key, value, merge=False, force_add=True)
    model.predict()


def compile_names(checkpoint, target):
    """Write a checkpoint with the names of a compiled module, as ``compile: True`` gives."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    module = torch.nn.Module()
    module.backbone = torch.compile(network(content["hyper_parameters"]["backbone"]))
    module.load_state_dict(
        {
            name.replace("backbone.", "backbone._orig_mod."): value
            for name, value in content["state_dict"].items()
        }
    )
    torch.save(content | {"state_dict": module.state_dict()}, target)


def network(arguments):
    from monai.networks.nets import DynUNet

    return DynUNet(**{key: value for key, value in arguments.items() if key != "_target_"})


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for case in asked["cases"]:
        predict(case)
    compile_names(*asked["compile"])


if __name__ == "__main__":
    main()
