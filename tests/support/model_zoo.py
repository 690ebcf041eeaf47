"""Create models of torchvision, timm, transformers, segmentation-models-pytorch, monai and ultralytics."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

KEPT: list[Any] = []


def declare_operators() -> None:
    """Declare two operators that torchvision's wheel, which is built for CUDA, lacks with a CPU build of torch."""
    if torch.version.cuda is not None:  # the wheel defines them itself
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    KEPT.append(library)  # the operators exist as long as this object
    if not hasattr(torch.ops.torchvision, "nms"):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# ------------------------------------------------------------------------------------------------------- the models
TORCHVISION = """
    resnet18 resnet50 resnext50_32x4d regnet_x_400mf regnet_y_400mf densenet121 mobilenet_v2
    mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0
    inception_v3 googlenet quantization.resnet18 quantization.mobilenet_v2 segmentation.deeplabv3_mobilenet_v3_large
    segmentation.fcn_resnet50 segmentation.lraspp_mobilenet_v3_large detection.fasterrcnn_mobilenet_v3_large_320_fpn
    detection.ssdlite320_mobilenet_v3_large detection.fcos_resnet50_fpn detection.retinanet_resnet50_fpn_v2
    detection.maskrcnn_resnet50_fpn detection.keypointrcnn_resnet50_fpn video.r3d_18 video.mc3_18 video.r2plus1d_18
    video.s3d
"""
TIMM = """
    resnet18 resnet26d seresnet50 ecaresnet26t skresnet18 resnext26ts regnetx_002 regnety_002 efficientnet_b0
    efficientnet_lite0 efficientnetv2_rw_t tf_efficientnet_b0 mobilenetv2_050 mobilenetv3_small_050
    mobilenetv4_conv_small_035 ghostnet_050 ghostnetv2_100 levit_128s efficientformer_l1 efficientformerv2_s0
    fastvit_t8 repvgg_a0 repghostnet_050 mobileone_s0 dla34 hrnet_w18_small res2net50_14w_8s resnest14d rexnet_100
    hardcorenas_a mixnet_s mnasnet_small fbnetc_100 spnasnet_100 selecsls42 ese_vovnet19b_dw densenet121 dpn48b
    cspresnet50 cspdarknet53 darknet53 gernet_s inception_v3 inception_v4 xception41 legacy_seresnet18 lcnet_050
    tinynet_e visformer_tiny mobilevit_xxs mobilevitv2_050 repvit_m0_9 efficientvit_b0 efficientvit_m0 starnet_s1
    tiny_vit_5m_224 hgnet_tiny hgnetv2_b0 bat_resnext26ts eca_botnext26ts_256 halonet26t lambda_resnet26t vgg11_bn
    swiftformer_xs fasternet_t0 convmixer_768_32 tf_mixnet_s
"""
SMP = """
    Unet:resnet18 UnetPlusPlus:resnet18 MAnet:resnet18 Linknet:resnet18 FPN:resnet18 PSPNet:resnet18
    DeepLabV3:resnet18 DeepLabV3Plus:mobilenet_v2 PAN:resnet18 UPerNet:resnet18 Segformer:resnet18
    Unet:efficientnet-b0 Unet:densenet121 Unet:timm-regnetx_002 Unet:se_resnet50
"""
ULTRALYTICS = """
    yolov8n.yaml yolov5n.yaml yolo11n.yaml yolov8n-seg.yaml yolov8n-pose.yaml yolov8n-cls.yaml yolov10n.yaml
    rtdetr-l.yaml yolov3-tiny.yaml yolov9t.yaml
"""
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("ResNetForImageClassification", {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 32, 64, 64]}),
    "RegNet": ("RegNetForImageClassification", {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 32, 64, 64],
                                                "groups_width": 16, "embedding_size": 16}),
    "MobileNetV1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}),
    "EfficientNet": ("EfficientNetForImageClassification", {"width_coefficient": 1.0, "depth_coefficient": 0.5,
                                                             "hidden_dim": 1280}),
    "Levit": ("LevitForImageClassification", {"image_size": 64, "depths": [1, 1, 1], "hidden_sizes": [32, 48, 64],
                                              "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8]}),
    "MobileViT": ("MobileViTForImageClassification", {"hidden_sizes": [16, 24, 32], "image_size": 64,
                                                      "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 32]}),
    "MobileViTV2": ("MobileViTV2ForImageClassification", {"width_multiplier": 0.25, "image_size": 64}),
    "Segformer": ("SegformerForSemanticSegmentation", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32],
                                                       "decoder_hidden_size": 16}),
    "SwiftFormer": ("SwiftFormerForImageClassification", {"depths": [1, 1, 1, 1], "image_size": 64}),
    "TextNet": ("TextNetForImageClassification", {}),
    "HGNetV2": ("HGNetV2ForImageClassification", {}),
    "Detr": ("DetrForObjectDetection", {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
                                        "encoder_layers": 1, "decoder_layers": 1, "d_model": 32,
                                        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}),
    "RTDetr": ("RTDetrForObjectDetection", {"encoder_hidden_dim": 32, "d_model": 32, "decoder_layers": 1,
                                            "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
                                            "decoder_in_channels": [32, 32, 32]}),
    "Wav2Vec2Conformer": ("Wav2Vec2ConformerModel", {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32,
                                                     "num_attention_heads": 2, "conv_dim": [16, 16],
                                                     "conv_stride": [5, 4], "conv_kernel": [10, 8],
                                                     "num_feat_extract_layers": 2,
                                                     "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4,
                                                     "mask_time_prob": 0.0, "layerdrop": 0.0}),
}  # fmt: skip
MONAI: dict[str, dict[str, Any]] = {
    "UNet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2),
             "num_res_units": 2, "norm": "batch"},
    "AttentionUnet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (8, 16, 32),
                      "strides": (2, 2)},
    "BasicUNet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "features": (8, 8, 16, 16, 32, 8),
                  "norm": "batch"},
    "DenseNet121": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2},
    "resnet18": {"spatial_dims": 2, "n_input_channels": 3},
    "SEResNet50": {"spatial_dims": 2, "in_channels": 3},
    "VNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
    "SegResNet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "norm": "batch"},
    "DynUNet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
                "upsample_kernel_size": [2, 2], "norm_name": "batch", "filters": [8, 16, 32]},
    "EfficientNetBN": {"model_name": "efficientnet-b0", "spatial_dims": 2, "pretrained": False},
    "HighResNet": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2},
    "FlexibleUNet": {"in_channels": 3, "out_channels": 2, "backbone": "resnet18", "pretrained": False},
}  # fmt: skip


def names() -> list[str]:
    """Return the names of all models as ``library/model``."""
    lists: dict[str, Any] = {
        "torchvision": TORCHVISION.split(),
        "timm": TIMM.split(),
        "transformers": TRANSFORMERS,
        "smp": SMP.split(),
        "monai": MONAI,
        "ultralytics": ULTRALYTICS.split(),
    }
    return [f"{library}/{name}" for library, models in lists.items() for name in models]


def make(name: str) -> torch.nn.Module:
    """Create a model with random weights. Nothing is downloaded."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    return globals()[f"_make_{library}"](model)  # type: ignore[no-any-return]


def _make_torchvision(name: str) -> Any:
    package, _, function = name.rpartition(".")
    module = import_module("torchvision.models" + f".{package}" * bool(package))
    options: dict[str, Any] = {"weights": None}
    if package in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name in ("inception_v3", "googlenet"):
        options |= {"init_weights": False, "aux_logits": name == "googlenet"}
    if package == "quantization":
        options["quantize"] = False
    model = getattr(module, function)(**options)
    return Heads(model) if package == "detection" else model


class Heads(torch.nn.Module):
    """A detector without its last step, which chooses outputs: rounding errors decide the choice."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _make_timm(name: str) -> Any:
    import timm

    sized = any(part in name for part in ("vit", "levit", "efficientformer", "botnext", "halo", "lambda",
                                          "visformer"))  # fmt: skip
    dropping = {"ghostnet_050": "drop_rate"} | dict.fromkeys(
        ("efficientnet_b0", "levit_128s", "efficientformer_l1"), "drop_path_rate"
    )
    drops = {dropping[name]: 0.1} if name in dropping else {}
    for size in ({"img_size": 64}, {"input_size": (3, 64, 64)}, {}) if sized else ({},):
        try:
            return timm.create_model(name, pretrained=False, num_classes=10, **drops, **size)
        except (TypeError, AssertionError):
            pass
    raise ValueError(f"{name} cannot be created")


def _make_smp(name: str) -> Any:
    import segmentation_models_pytorch as smp

    kind, _, encoder = name.partition(":")
    return getattr(smp, kind)(encoder, encoder_weights=None, classes=2)


def _make_transformers(name: str) -> Any:
    import transformers

    kind, options = TRANSFORMERS[name]
    options = dict(options)
    if name == "Detr":
        options["backbone_config"] = transformers.ResNetConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 64], embedding_size=16, out_features=["stage4"]
        )
        options.pop("backbone")
    if name == "RTDetr":
        options["backbone_config"] = transformers.RTDetrResNetConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 64, 64],
            embedding_size=16,
            out_features=["stage2", "stage3", "stage4"],
        )
        options["encoder_in_channels"] = [32, 64, 64]
    return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**options))


def _make_monai(name: str) -> Any:
    return getattr(import_module("monai.networks.nets"), name)(**MONAI[name])


def _make_ultralytics(name: str) -> Any:
    from ultralytics.nn import tasks

    kinds = {
        "-seg": "SegmentationModel",
        "-pose": "PoseModel",
        "-cls": "ClassificationModel",
        "rtdetr": "RTDETRDetectionModel",
    }
    kind = next((kind for part, kind in kinds.items() if part in name), "DetectionModel")
    return getattr(tasks, kind)(name, verbose=False)


SIZES = {"inception": 96, "xception": 96, "PAN": 128, "tiny_vit": 224, "swiftformer_xs": 224,
         "efficientformer_l1": 224, "s3d": 224, "halonet": 256, "lambda": 224,
         "bat_resnext": 256}  # fmt: skip
"""The image sizes of models that need more than 64 pixels, by a part of the name."""


def batch(name: str, model: torch.nn.Module, count: int = 4) -> tuple[Any, ...]:
    """Return a small random batch for a model."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    if "Conformer" in name:
        return (torch.randn(count, 4000, generator=generator, dtype=torch.float64).to(dtype),)
    size = next((size for part, size in SIZES.items() if part in name), 64)
    fixed = [getattr(module, "img_size", None) for module in model.modules()]
    required = next((each for each in fixed if isinstance(each, tuple)), None)
    size = required[0] if required and name.startswith("timm/") else size
    count = count if size <= 128 else 2
    shape: tuple[int, ...] = (count, 1 if name == "monai/VNet" else 3, size, size)
    if "video" in name:
        shape = (1, 3, 16, size, size) if "s3d" in name else (2, 3, 8, 32, 32)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),)
