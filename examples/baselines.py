"""What DiffusionNFT is compared with: policy gradients on the reverse process, and supervised fine-tuning.

    python examples/baselines.py flowgrpo --model tiny-sd3 --out runs/flowgrpo
    python examples/baselines.py ddpo --out runs/ddpo                   # on tiny, as are dpok, loop, rwr and rft
    python examples/baselines.py ddpo --out runs/ddpo-2 --clip-range 1e-2 --train-times 5

    method    paper                 weight of an image                      loss of a step or of a noised image
    flowgrpo  arXiv 2505.05470      (r - mean) / std of the prompt's K      PPO's clipped ratio + KL to the base
    ddpo      arXiv 2305.13301      (r - mean) / std of the prompt so far   PPO's clipped ratio
    dpok      arXiv 2305.16381      r - mean of the prompt's K              clipped ratio + squared distance to the base
    loop      arXiv 2503.00897      r - mean of the other K - 1             PPO's clipped ratio
    rwr       arXiv 2305.13301 4.2  softmax(r / temperature) of the K       denoising loss
    rft       arXiv 2305.13301 4.2  1 where r > mean of the K, else 0       denoising loss

All else is nft.py's, with its flags: pipeline, LoRA, prompts, rewards, AdamW, gradient clipping, updates an iteration,
evaluation (the run's --solver, the same noise, theta's EMA) and run directory. The policy that samples is theta at
the iteration's start (`eta` is logged as 0); --beta, --eta and --z play no part. `r_std` is the standard deviation
of the weights, `kl` is 0 where --kl is, `old_deviation` is 0 for rwr and rft, which have no use for the old policy.

The first four need a sampler that draws each step from a Gaussian: the pipeline runs with its solver's step replaced
by such a one, DDIM with eta = 1, or FlowGRPO's stochastic differential equation where the model is a flow. They train
on all steps of an image unless --train-times says fewer; rwr and rft sample and draw noise levels as nft.py does.

`evaluations`: samples put through the denoiser so far, in rollouts and in training, measured by a hook; evaluation
is left out. A forward pass with a backward one counts as one (it costs about three). An image of weight 0 adds
nothing to the loss without KL, and is not evaluated (as in FlowGRPO's code). For nft.py itself: see `Count`.

Departures from all: what nft.py does alike for every method (learning rate, warm-up, LoRA, no guidance, `updates`
optimizer steps an iteration instead of an accumulation scheme of their own). More are named at their lines.
SPDX-License-Identifier: MIT
"""
import dataclasses
import functools
import math
import pathlib
import runpy
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import nft


# ---- The weight of each image, from the rewards raw (G, K) of G prompts with K images each: (G, K) -----------------
def group_advantages(raw, prompts, memory, config):
    """FlowGRPO, section 4.1: (R - mean of the group) / std of the group; 1e-4 and the clamp are its code's.

    The authors' runs divide by the std of all rewards (`global_std`); the paper, and so this, by the group's."""
    return ((raw - raw.mean(1, True)) / (raw.std(1, correction=0, keepdim=True) + 1e-4)).clamp(-5, 5)


def running_advantages(raw, prompts, memory, config):
    """DDPO, appendix D.3: by the mean and std of the prompt's last 32 rewards, in `memory` {prompt: list}.

    Departs: its code takes those of all images until a prompt has 16 rewards; here a prompt's K images come at once
    (and the shapes' 960 prompts return only after 60 iterations of 16). The clamp and the 32 are its code's."""
    for prompt, rewards in zip(prompts, raw.tolist()):
        memory[prompt] = (memory.get(prompt, []) + rewards)[-32:]
    known = [torch.tensor(memory[prompt], dtype=raw.dtype) for prompt in prompts]
    mean, std = torch.tensor([[[x.mean()], [x.std(correction=0)]] for x in known], dtype=raw.dtype).unbind(1)
    return ((raw - mean) / (std + 1e-6)).clamp(-10, 10)


def baseline_advantages(raw, prompts, memory, config):
    """DPOK, policy gradient with a baseline. Departs: the mean of the prompt's K, not a learned value of (x_t, c)."""
    return raw - raw.mean(1, True)


def leave_one_out(raw, prompts, memory, config):
    """LOOP: r_i - mean of the other K - 1 rewards of the prompt, which owes nothing to image i: no bias."""
    return raw - (raw.sum(1, True) - raw) / (raw.shape[1] - 1)


def exponential_weights(raw, prompts, memory, config):
    """RWR, DDPO's section 4.2: exp(r / temperature) / Z. Z makes a prompt's K weights average 1: D.3's softmax."""
    return raw.shape[1] * (raw / config.temperature).softmax(1)


def positive_weights(raw, prompts, memory, config):
    """RFT, DDPO's w_sparse = 1[r >= C] in section 4.2. Departs: C lies just above the prompt's mean reward, where D.2
    and D.3 keep a prompt's best tenth: an exact reward keeps all right images, and equal images teach nothing."""
    return (raw > raw.mean(1, True)).to(raw.dtype)


# ---- The loss of a step (b,) from the ratio p_theta / p_old (b,), advantages A (b,), clip range e; and the KL -------
def clipped_loss(ratio, A, e):
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A): PPO, as in FlowGRPO's section 4.1, DDPO_IS of 4.3 and D.1, LOOP."""
    return -torch.minimum(ratio * A, ratio.clamp(1 - e, 1 + e) * A)


def one_sided_loss(ratio, A, e):
    """-clip(ratio, 1 - e, 1 + e) A: DPOK's code clips without PPO's min, also steps that went the wrong way."""
    return -ratio.clamp(1 - e, 1 + e) * A


def gaussian_kl(mean, mean_ref, std, out, out_ref):
    """KL of two Gaussians of equal std, FlowGRPO Eq. (10); averaged over dimensions, as the log-probabilities are."""
    return ((mean - mean_ref).square() / (2 * std ** 2)).flatten(1).mean(1)


def output_kl(mean, mean_ref, std, out, out_ref):
    """DPOK's KL(p_theta(x_{t-1} | x_t) || p_base) of its Lemma 4.2, which is a multiple of this: its code drops it."""
    return (out - out_ref).square().flatten(1).mean(1)


@dataclasses.dataclass
class Method:
    """A row of METHODS."""
    weigh: Callable                     # rewards -> weights or advantages
    loss: Callable | None = None        # None: weighted denoising, and no Gaussian steps
    kl: Callable | None = None          # what --kl weighs
    trained: float = 1.0                # share of the sampler's steps, from the first on, that is trained
    flags: dict = dataclasses.field(default_factory=dict)      # defaults; flags of the command line win


ALL = {"train-times": 1000}             # all steps of an image (DDPO, D.1)
METHODS = {
    # KL 0.04: the paper's for exact rewards (GenEval, text). 0.99: its code leaves out the last step.
    "flowgrpo": Method(group_advantages, clipped_loss, gaussian_kl, 0.99, ALL | {"kl": 0.04}),
    "ddpo": Method(running_advantages, clipped_loss, gaussian_kl, flags=ALL | {"kl": 0}),
    # KL 1e-4: its README trains many prompts with weight 1000 on the reward and 0.1 on the KL.
    "dpok": Method(baseline_advantages, one_sided_loss, output_kl, flags=ALL | {"kl": 1e-4}),
    "loop": Method(leave_one_out, clipped_loss, gaussian_kl, flags=ALL | {"kl": 0}),
    "rwr": Method(exponential_weights, flags={"kl": 0}),
    "rft": Method(positive_weights, flags={"kl": 0}),
}


@dataclasses.dataclass
class Config(nft.Config):
    """nft.py's settings and a few more."""
    method: str = nft.flag("", "the first word of the command", choices=tuple(METHODS))
    clip_range: float = nft.flag(1e-4, "of the ratio, as DDPO's, DPOK's and FlowGRPO's; tiny latents want more, "
                                 "1e-3 to 1e-2", 0)
    noise_level: float = nft.flag(0.7, "a of a flow's sigma_t = a sqrt(t / (1 - t)), FlowGRPO", 1e-9)
    temperature: float = nft.flag(0.2, "of rwr's exp(r / temperature), for rewards in [0, 1]; DDPO's 5 is "
                                  "for kilobytes and aesthetics", 1e-9)


# ---- Gaussian steps of the reverse process --------------------------------------------------------------------------
def ddim_step(x_0, eps, alpha_bar, alpha_bar_next):
    """Mean and std of x_{t-1} given x_t: DDIM (arXiv 2010.02502), Eq. (12), with sigma of Eq. (16) at eta = 1.

    x_0, eps: (b, ...), as the denoiser predicts them at x_t. alpha_bar: (b, 1, ...), alphas_cumprod at t, then t-1."""
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    return alpha_bar_next.sqrt() * x_0 + (1 - alpha_bar_next - variance).sqrt() * eps, variance.sqrt()


def flow_step(x_t, v, t, t_next, a, t_max):
    """Mean and std of x at t_next < t given x_t: FlowGRPO Eq. (9) with sigma_t = a sqrt(t / (1 - t)).

    x_t, v: (b, ...). t: (b, 1, ...) in (0, 1]. t_max < 1 stands for t in 1 - t at t = 1, as in FlowGRPO's code."""
    dt = t_next - t                                                                     # negative
    sigma = a * (t / (1 - t.clamp(max=t_max))).sqrt()
    drift = v + sigma ** 2 / (2 * t) * (x_t + (1 - t) * v)
    return x_t + drift * dt, sigma * (-dt).sqrt()


def log_prob(x, mean, std):
    """log N(x; mean, std^2), *averaged* over dimensions as in DDPO's, DPOK's and FlowGRPO's code: (b, ...) -> (b,).

    So the ratio's spread falls with their number: --clip-range 1e-4 on SD1.5's 16384 is like 8e-4 on tiny's 256."""
    density = -(x - mean).square() / (2 * std ** 2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


class Chain:
    """A model that samples as a Markov chain of T Gaussian steps, and remembers them; nft.collect takes it as model.

    The pipeline does all else itself: text, times, decoding. Only its solver's `step` is ours."""
    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device
        self.flow = model.alphas_cumprod is None
        self.solver = nft.pick_solver("euler" if self.flow else "ddim", model.pipe.scheduler.config, self.flow)

    def read_schedule(self):
        """When the pipeline has set the solver's times: `times` (T,) as the denoiser takes them, and `levels` (T + 1,),
        sigma of a flow, else alpha_bar, from which to which the steps lead."""
        t, device = self.solver.timesteps.cpu(), self.model.device
        if self.flow:
            levels = self.solver.sigmas
        else:                           # the last step ends at alpha_bar of time 0, as in DDPO's code: its std is not 0
            end = (t[-1:] - self.model.T // len(t)).clamp_min(0)
            levels = self.solver.alphas_cumprod[torch.cat([t, end]).long()]
        self.times, self.levels = t.to(device) * self.model.time_scale, levels.float().to(device)

    def gaussian(self, x, out, k):
        """Mean (b, ...) and std (b, 1, ...) of step k (b,) in 0 ... T - 1 from x (b, ...) and the denoiser's out."""
        now, then = (self.levels[i].view(-1, *[1] * (x.ndim - 1)) for i in (k, k + 1))
        if self.flow:
            return flow_step(x, out, now, then, self.config.noise_level, self.levels[1])
        alpha, sigma = now.sqrt(), (1 - now).sqrt()
        x_0, _ = nft.predict_x0(x, out, alpha, sigma, self.model.prediction)
        return ddim_step(x_0, (x - alpha * x_0) / sigma, now, then)

    def sample(self, prompts, seeds, policy):
        """As nft.Model.sample, and `path` (B, T + 1, ...), the latents, `outs` (B, T, ...), the denoiser's outputs."""
        path, outs, noise = [], [], [nft.generator(*seed, "steps") for seed in seeds]
        def step(out, t, x, **_):
            if not outs:
                self.read_schedule()
                path.append(x.float())
            k = torch.full((len(x),), len(outs), device=x.device)
            mean, std = self.gaussian(x.float(), out.float(), k)
            eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in noise]).to(x.device)
            x_next = (mean + std * eps).to(x.dtype)
            outs.append(out.float())
            path.append(x_next.float())
            return (x_next,)
        self.solver.step = step
        with mock.patch.object(self.model.pipe, "scheduler", self.solver):
            rollout = self.model.sample(prompts, seeds, policy)
        return rollout | {"path": torch.stack(path, 1), "outs": torch.stack(outs, 1)}


# ---- Losses of b pairs: three (b,), the loss, the KL and the deviation from the old policy's output -----------------
def step_losses(chain, rollout, i, k, A):
    """Of the steps k (b,) of the images i (b,) with the advantages A (b,)."""
    method, model, config = METHODS[chain.config.method], chain.model, chain.config
    x, x_next, out_old = rollout["path"][i, k], rollout["path"][i, k + 1], rollout["outs"][i, k]
    condition = nft.map_tensors(lambda c: c[i], rollout["condition"])
    if config.kl:
        with torch.no_grad():
            out_ref = model.predict(x, chain.times[k], condition, None)
    out = model.predict(x, chain.times[k], condition, "theta")      # last: --checkpointing recomputes it
    (mean, std), (mean_old, _) = chain.gaussian(x, out, k), chain.gaussian(x, out_old, k)
    ratio = (log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)).exp()
    loss, kl = method.loss(ratio, A, config.clip_range), torch.zeros_like(A)
    if config.kl:
        kl = method.kl(mean, chain.gaussian(x, out_ref, k)[0], std, out, out_ref)
    return loss, kl, (out.detach() - out_old).square().flatten(1).mean(1)


def denoising_losses(model, rollout, i, t, w, eps):
    """Of the images i (b,), noised by eps (b, ...) to the times t (b,): what pretraining minimises, times w (b,)."""
    x_0, condition = rollout["x_0"][i], nft.map_tensors(lambda c: c[i], rollout["condition"])
    alpha, sigma = model.alpha_sigma(t, x_0.ndim)
    target = {"flow_prediction": eps - x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0}[model.prediction]
    x_t = alpha * x_0 + sigma * eps
    if model.config.kl:
        with torch.no_grad():
            out_ref = model.predict(x_t, t, condition, None)
    out, kl = model.predict(x_t, t, condition, "theta"), torch.zeros_like(w)    # theta last, as above
    if model.config.kl:
        kl = output_kl(None, None, None, out, out_ref)
    return w * (out - target).square().flatten(1).mean(1), kl, torch.zeros_like(w)


# ---- Training -------------------------------------------------------------------------------------------------------
class Count:
    """Samples that went through a model's denoiser since: `Count(model).n`; with guidance each counts twice.

    nft.py's own runs: images * (sampler's evaluations + train_times * (3 if kl else 2)), theta, old and base."""
    def __init__(self, model):
        self.n = 0
        model.net.register_forward_hook(self.add)

    def add(self, net, args, out):
        """The hook: out[0] is (B, ...)."""
        self.n += len(out[0])


def draw_times(model, chain, N, noise):
    """What of each of N images is trained, without repeats: step indices of a chain, else times: (N, train_times)."""
    config, method = model.config, METHODS[model.config.method]
    if not chain and config.times == "uniform":                                         # as nft.train
        t = model.T * (1 - torch.rand(N, config.train_times, generator=noise))
        return t * model.time_scale if model.alphas_cumprod is None else t.ceil() - 1
    choice = torch.arange(max(1, int(method.trained * len(chain.times)))) if chain else model.times
    return choice[torch.rand(N, len(choice), generator=noise).argsort(1)[:, :config.train_times]]


def setup(config):
    """(model, chain or None, rewards trained on, rewards watched, prompts, held-out prompts), as in nft.train."""
    if config.method not in METHODS:
        nft.refuse(f"METHOD {config.method!r}: must be one of {', '.join(METHODS)}, before all flags; add it")
    if nft.WORLD > 1:
        nft.refuse(f"torchrun with {nft.WORLD} processes: must be 1 here; nft.py alone divides its work")
    if METHODS[config.method].loss and config.guidance != 1:
        nft.refuse(f"--guidance {config.guidance}: must be 1 for {config.method}: the probability of a step is that "
                   "of the conditional model alone; leave it out")
    prompts = nft.load_prompts(config.prompts)
    held_out = nft.load_prompts(config.eval_prompts, "--eval-prompts") if config.eval_prompts else \
        [prompts.pop() for _ in range(min(64, len(prompts) // 10))] or prompts
    model, files = nft.Model(config), functools.cache(runpy.run_path)
    if model.dtype == torch.float16:
        nft.refuse(f"--precision {config.precision}: must not come to fp16 here; take bf16 or fp32")
    rewards, watched = (nft.load_rewards(getattr(config, name), f"--{name}", files)
                        for name in ("reward", "watch"))
    watched = rewards + [(name, 0.0, call) for name, _, call in watched]
    if not rewards:
        nft.refuse("--reward: must name one; try jpeg")
    return model, Chain(model) if METHODS[config.method].loss else None, rewards, watched, prompts, held_out


def optimize(model, chain, optimizer, rollout, w, first):
    """`updates` optimizer steps, the first of which is number `first` of the run. w: (N,). Returns sums to log."""
    config, theta, N = model.config, model.lora.sets["theta"], len(w)
    noise = nft.generator(config.seed, first, "training")
    chosen = draw_times(model, chain, N, noise)
    sums = dict.fromkeys(("loss", "kl", "old_deviation", "grad_norm"), 0.0)
    for step, shard in enumerate(torch.randperm(N, generator=noise).tensor_split(config.updates), first):
        index, which = shard.repeat_interleave(chosen.shape[1]), chosen[shard].flatten()
        useful = ((w[index] != 0) | (config.kl > 0)).nonzero().flatten()        # the others' loss and gradient are 0
        for some in useful.split(config.batch_size) if len(useful) else ():
            i, weight = index[some].to(model.device), w[index[some]].float().to(model.device)
            if chain:
                losses = step_losses(chain, rollout, i, which[some].to(model.device), weight)
            else:
                eps = torch.randn(len(some), *rollout["x_0"].shape[1:], generator=noise).to(model.device)
                losses = denoising_losses(model, rollout, i, which[some], weight, eps)
            ((losses[0] + config.kl * losses[1]).sum() / len(index)).backward()
            for name, x in zip(sums, losses):
                sums[name] += x.sum().item() / chosen.numel()
        norm = torch.nn.utils.clip_grad_norm_(theta, 1.0)
        if not (norm.isfinite() and math.isfinite(sums["loss"] + sums["kl"])):
            nft.refuse("the loss or its gradient is not finite; try a smaller --lr, or --precision bf16 or fp32")
        optimizer.param_groups[0]["lr"] = config.lr * min(1, step / max(1, config.warmup))
        optimizer.step()                                    # does nothing where no image of the shard was useful
        optimizer.zero_grad(set_to_none=True)
        sums["grad_norm"] += norm.item() / config.updates
        model.lora.average("ema", config.ema)
    return sums


def train(config):
    """Collect, reward, optimize, log, for every method. Returns the closing line for the user."""
    from tqdm import tqdm
    model, chain, rewards, watched, prompts, held_out = setup(config)
    lora, K, state = model.lora, config.group_size, {"memory": {}}
    torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(lora.sets["theta"], lr=config.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    def restore(saved):
        nft.map_tensors(lambda ours, theirs: ours.data.copy_(theirs.view_as(ours)), lora.sets, saved["lora"])
        optimizer.load_state_dict(saved["optimizer"])
        state["memory"] = saved["memory"]
    run = nft.Run(config, restore)
    def snapshot():
        return nft.map_tensors(lambda x: x.detach().to("cpu", copy=True), {
            "rows": list(run.rows), "lora": lora.sets, "optimizer": optimizer.state_dict(),
            "memory": dict(state["memory"])})
    last, started, count = snapshot(), time.time(), Count(model)
    try:
        if not run.rows:
            row = {"iteration": 0, "images": 0, **nft.evaluate(model, run, watched, held_out, 0)}
            run.log(row | {"skipped_steps": 0, "evaluations": 0, "seconds": time.time() - started})
        done, count.n = run.rows[-1]["iteration"], run.rows[-1]["evaluations"]
        started = time.time() - run.rows[-1]["seconds"]
        for iteration in tqdm(range(done + 1, config.iterations + 1), config.method, config.iterations, initial=done,
                              position=1, disable=None):
            # Collect: K images of each prompt from theta as it stands, by Gaussian steps or by any solver
            drawn = nft.draw_prompts(prompts, iteration, config)
            images, N = [c for c in drawn for _ in range(K)], config.groups * K
            rollout, raw, parts = nft.collect(chain or model, rewards, images, (config.seed, iteration), "old")

            # Reward: from r_raw of each image its weight or advantage. In float64 the mean of equal rewards is theirs
            names, grouped = [text for text, _ in drawn], raw.double().view(-1, K)
            w = METHODS[config.method].weigh(grouped, names, state["memory"], config).flatten()

            # Optimize: pairs of an image and a step or a time; theta samples next
            sums = optimize(model, chain, optimizer, rollout, w, (iteration - 1) * config.updates + 1)
            lora.average("old", 0.0)

            # Log, evaluate, save: rows as nft.train's
            rough, evaluations = rollout["laplacian"].mean().item(), count.n
            base = max(1e-9, run.rows[1]["laplacian"] if iteration > 1 else rough)
            row = {"iteration": iteration, "images": iteration * N, "eta": 0.0, **sums,
                   "reward": raw.mean().item(), "reward_std": raw.std(correction=0).item(),
                   **{f"reward/{name}": x.mean().item() for name, x in parts.items()},
                   "r_std": w.std(correction=0).item(), "laplacian": rough, "roughness": rough / base,
                   "skipped_steps": 0, "evaluations": evaluations}
            final = iteration == config.iterations
            if final or iteration % config.eval_every == 0:
                row.update(nft.evaluate(model, run, watched, held_out, iteration))
            count.n = evaluations
            run.log(row | {"seconds": time.time() - started})
            last = snapshot()
            if final or iteration % config.save_every == 0:
                run.save(last, lora.names, model.component)
        return nft.conclude(model, run, [*dict(held_out).items()][:16])
    except (Exception, KeyboardInterrupt) as e:
        run.save(last, lora.names, model.component)
        done = last["rows"][-1]["iteration"] if last["rows"] else 0
        e.saved = (f"; iteration {done} is saved, go on with: python examples/baselines.py {config.method} "
                   f"--out {run.dir} --resume")
        raise


def main(argv=None):
    """METHOD and flags, through nft.py's own command line with this file's settings and loop; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        row = METHODS.get(argv[0]) if "--resume" not in argv else None      # a resumed run has its own settings
        defaults = [x for name, value in (row.flags if row else {}).items() for x in (f"--{name}", str(value))]
        argv = ["--method", argv[0], *defaults, *argv[1:]]
    with mock.patch.multiple(nft, Config=Config, train=train):
        return nft.main(argv)


if __name__ == "__main__":
    sys.exit(main())
