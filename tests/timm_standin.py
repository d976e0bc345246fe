"""A small train script of the shape of timm's: arguments, a task, an optimizer, resume, EMA, DDP, a saver.

Run by tests through `timm_lowrank.integrations.timm_train`, and by itself as its plain counterpart. It knows nothing of
low rank. The data are scikit-learn's digits at twice their size, in an order that depends on the epoch alone.
"""

import argparse
import contextlib
import os
from collections import OrderedDict

import torch
import yaml
from sklearn.datasets import load_digits
from timm import utils
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)

parser = argparse.ArgumentParser(description="Train on digits")
parser.add_argument("data", nargs="?", metavar="DIR")
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--num-classes", type=int, default=10)
parser.add_argument("--img-size", type=int, default=16)
parser.add_argument("--images", type=int, default=96, help="of the training set")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop-after", type=int, help="epochs of a run that is cut short")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--loss-scale", type=float, help="initial scale of a gradient scaler")
parser.add_argument("--bce-loss", action="store_true")
parser.add_argument("--multi-label", action="store_true")
parser.add_argument("--kd-model-name")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--torchscript", action="store_true")
parser.add_argument("--resume", default="")
parser.add_argument("--output")


def digits(size):
    """Images (1797, 3, size, size) and labels (1797,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return torch.nn.functional.interpolate(images, size).expand(-1, 3, -1, -1), torch.from_numpy(data.target)


def build_task(args, model, device):
    """The task that the arguments ask for."""
    if args.kd_model_name:
        return LogitDistillationTask(
            student_model=model, teacher_model=args.kd_model_name, criterion=torch.nn.CrossEntropyLoss(), device=device
        )
    if args.multi_label:
        return MultiLabelClassificationTask(model=model, device=device)
    criterion = BinaryCrossEntropy(smoothing=0.1) if args.bce_loss else LabelSmoothingCrossEntropy(0.1)
    return ClassificationTask(model=model, criterion=criterion, device=device, verbose=utils.is_primary(args))


def train_one_epoch(epoch, model, data, optimizer, args, task=None, scaler=None):
    """Plain steps over this process's share of the data; the mean loss, for the summary."""
    task.get_trainable_module().train()
    images, labels = data
    order = torch.randperm(args.images, generator=torch.Generator().manual_seed(epoch))[args.rank :: args.world_size]
    batches = order.split(args.batch_size)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.amp else contextlib.nullcontext()
    updates_per_epoch = -(-len(batches) // args.grad_accum_steps)
    step, losses = epoch * updates_per_epoch, []
    for index, batch in enumerate(batches):
        last = index + 1 == len(batches)
        updates_now = last or (index + 1) % args.grad_accum_steps == 0
        with contextlib.nullcontext() if updates_now else task.no_sync():
            with autocast:
                loss = task(images[batch], labels[batch])["loss"]
            loss = loss / args.grad_accum_steps
            (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.item())
        if not updates_now:
            continue
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(task.get_clip_parameters(), args.clip_grad)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        step += 1
        optimizer.zero_grad()
        task.update_ema(step=step)
    return OrderedDict(loss=sum(losses) / len(losses))


@torch.inference_mode()
def validate(model, data):
    """Accuracy on the last 100 digits."""
    model.eval()
    images, labels = data[0][-100:], data[1][-100:]
    if labels.dim() == 2:
        labels = labels.argmax(dim=1)
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main():
    args = parser.parse_args()
    args_text = yaml.safe_dump(args.__dict__)
    args.device, args.no_prefetcher = "cpu", True
    device = utils.init_distributed_device(args)
    torch.set_num_threads(1)
    utils.setup_default_logging()
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=args.num_classes)
    resolve_data_config(vars(args), model=model)
    if args.torchscript:
        model = torch.jit.script(model)
    task = build_task(args, model, device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), args.opt, lr=0.05, weight_decay=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=args.loss_scale) if args.loss_scale else None
    start = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.8)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    saver = None
    if args.output and utils.is_primary(args):
        os.makedirs(args.output, exist_ok=True)
        with open(os.path.join(args.output, "args.yaml"), "w") as file:
            file.write(args_text)
        saver = utils.CheckpointSaver(
            model, optimizer, args=args, checkpoint_dir=args.output, recovery_dir=args.output, task=task
        )
    images, labels = digits(args.img_size)
    if args.multi_label:
        labels = torch.nn.functional.one_hot(labels, 10).float()
    for epoch in range(start, args.stop_after or args.epochs):
        measured = train_one_epoch(
            epoch, task.get_trainable_module(), (images, labels), optimizer, args, task=task, scaler=scaler
        )
        accuracy = validate(task.get_eval_model(), (images, labels))
        if utils.is_primary(args):
            print(f"epoch {epoch}: loss {measured['loss']:.4f}, accuracy {accuracy:.2f}")
        if saver is not None:
            saver.save_checkpoint(epoch, metric=accuracy)
            summary = os.path.join(args.output, "summary.csv")
            utils.update_summary(epoch, measured, {"top1": accuracy}, summary, write_header=epoch == start)
    if args.distributed:
        torch.save(task.get_task_state(), os.path.join(args.output, f"rank{args.rank}.pt"))
        torch.distributed.destroy_process_group()
    return task


if __name__ == "__main__":
    main()
