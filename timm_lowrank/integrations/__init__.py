"""Low-rank branches inside other people's training loops: a module for each loop, imported by its own name.

    from timm_lowrank.integrations.timm_task import LowRankTask
    from timm_lowrank.integrations.trainer import LowRankTrainer, LowRankCallback
    python -m timm_lowrank.integrations.timm_train PATH/train.py --lowrank CONFIG ...

Importing this package imports none of them, so that each needs only the library that it is for.
"""
