"""What DiffusionNFT is compared with: policy gradients on the reverse process, and fine-tuning.

    python examples/studies/baselines.py flowgrpo --model tiny-sd3 --out runs/flowgrpo
    python examples/studies/baselines.py ddpo --out runs/ddpo
    python examples/studies/baselines.py ddpo --out runs/ddpo-2 --clip-range 1e-2 --train-times 5

    method    paper                  weight of an image                 loss
    flowgrpo  arXiv 2505.05470       (r - mean) / std of the prompt's K PPO's, and KL to the base
    ddpo      arXiv 2305.13301       (r - mean) / std of the prompt's K PPO's
    dpok      arXiv 2305.16381       r - mean of the prompt's K         clipped ratio, and distance
    loop      arXiv 2503.00897       r - mean of the other K - 1        PPO's
    coca      arXiv 2505.19196       DDPO's, shared out among the steps PPO's
    rtb       arXiv 2405.20971       r - mean of the prompt's K         trajectory balance
    rwr       arXiv 2305.13301, 4.2  softmax(r / temperature) of the K  denoising
    rft       arXiv 2305.13301, 4.2  1 where r > mean of the K, else 0  denoising

Training is nft.train with a method's own parts, so all else is alike: pipeline, LoRA, prompts,
rewards, AdamW, gradient clipping, evaluation and run directory. All of nft.py's flags work, except
--resume. --beta and --z play no part. --eta must stay 0: the sampling policy is theta at the
iteration's start. In the log `r_std` is the spread of the weights, `kl` is 0 where --kl is 0, and
`old_deviation` is 0 for rwr and rft, which have no use for the old policy.

The first six methods sample by steps that are drawn from a Gaussian (`Chain`), and train on these
steps: on all of them, unless --train-times says fewer. rwr and rft sample and draw noise levels as
nft.py does. rtb's residual needs log p_base of every step of an iteration's images: so many samples
more go through the denoiser, as many as for a method with KL.

All methods depart from their papers where nft.py treats every method alike: learning rate, warm-up,
LoRA, no guidance, and `updates` optimizer steps an iteration. Comments "Departs" name the rest.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft


# ---- The weight of each image: rewards (N,) and groups (N,), as nft.optimality_reward -> (N,) ---
def by_prompt(raw, groups):
    """The rewards (N,) as (prompts, K), in float64: there the mean of equal rewards is theirs.

    groups: (N,) integers. The K images of a prompt follow each other, as in nft.train.
    """
    prompts = len(groups.unique())
    return raw.double().view(prompts, -1)


def standardized(rewards, added, limit):
    """(r - mean) / (std + added) of each row of (prompts, K), within +-limit: -> (N,), float32."""
    mean = rewards.mean(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    return ((rewards - mean) / (std + added)).clamp(-limit, limit).flatten().float()


def group_advantages(raw, groups, z):
    """FlowGRPO, section 4.1: (r - mean) / std of the prompt's K images.

    The 1e-4 and the limit 5 are its code's. The authors' runs divide by the std of all rewards
    (`global_std`); the paper, and so this, by the prompt's.
    """
    return standardized(by_prompt(raw, groups), added=1e-4, limit=5)


def prompt_advantages(raw, groups, z):
    """DDPO, appendix D.3: (r - mean) / std of the prompt's rewards; 1e-6 and 10 are its code's."""
    # Departs: D.3 takes a prompt's last 32 rewards. Here these are the K images of the iteration:
    # the 960 prompts of examples/tiny return only after 60 iterations of 16.
    return standardized(by_prompt(raw, groups), added=1e-6, limit=10)


def baseline_advantages(raw, groups, z):
    """DPOK: policy gradient with a baseline, r - mean of the prompt's K images."""
    # Departs: DPOK learns its baseline as a function of (x_t, prompt).
    rewards = by_prompt(raw, groups)
    return (rewards - rewards.mean(1, keepdim=True)).flatten().float()


def leave_one_out(raw, groups, z):
    """LOOP: r - mean of the prompt's other K - 1 rewards, so that the baseline has no bias."""
    rewards = by_prompt(raw, groups)
    others = rewards.sum(1, keepdim=True) - rewards
    return (rewards - others / (rewards.shape[1] - 1)).flatten().float()


def exponential_weights(raw, groups, z, temperature):
    """RWR, DDPO's section 4.2: exp(r / temperature) / Z, where a prompt's K weights average 1."""
    rewards = by_prompt(raw, groups)
    share = (rewards / temperature).softmax(1)
    return (rewards.shape[1] * share).flatten().float()


def positive_weights(raw, groups, z):
    """RFT, DDPO's section 4.2: w_sparse = 1 where r >= C, else 0."""
    # Departs: C lies just above the prompt's mean, where D.2 and D.3 keep a prompt's best tenth.
    # So an exact reward keeps all right images, and equal images teach nothing.
    rewards = by_prompt(raw, groups)
    return (rewards > rewards.mean(1, keepdim=True)).flatten().float()


# ---- From the images' weights to those of their steps: the iteration's D -> (N, T) ---------------
def conditions(D, index):
    """What the denoiser is given beside x_t and t, for the images index (b,)."""
    return nft.map_tensors(lambda c: c[index], D["condition"])


def shared_out(model, D):
    """CoCA: an image's advantage is shared out among its steps by what each brings towards x_0.

    s_k is the cosine similarity of x_0 to the clean image that is predicted at step k, and s_T = 1.
    Step k gains s_{k+1} - s_k, and its share is this over the sum of all gains, 1 - s_0. What
    counts for a step is its own share and those of the steps after it: (1 - s_k) / (1 - s_0) of the
    advantage, all of it for the first step. These are standardized once more over the prompt's
    images and steps. D["r"]: (N,), DDPO's advantages.
    """
    # Departs: the code averages s over windows of 5 of 50 steps, one of the ten here; its second
    # standardization mixes several iterations, and where a prompt has few images all prompts. The
    # first one's limit is DDPO's 10, not 5. Of the paper the abstract was read, and the code.
    similarities = []
    for k in range(D["outs"].shape[1]):
        x_t = D["path"][:, k]
        t = model.step_times[k].expand(len(x_t))
        alpha_t, sigma_t = model.noise_level(t, x_t.ndim)
        x0_hat, _ = nft.predict_x0(x_t, D["outs"][:, k], alpha_t, sigma_t, model.prediction)
        similarities.append(F.cosine_similarity(x0_hat.flatten(1), D["x_0"].flatten(1)))
    s = torch.stack(similarities, 1)
    to_go = (1 - s) / (1 - s[:, :1]).clamp_min(1e-6)
    A = D["r"].view(-1, 1) * to_go
    by_prompt = A.double().view(-1, model.config.group_size * s.shape[1])
    return standardized(by_prompt, added=1e-6, limit=5).view_as(A)


def log_ratios(model, D):
    """log p_old(trajectory) - log p_base(trajectory) of an iteration's images: (N,), in nats.

    p_old drew them. The sums are over all steps and dimensions, and in float64.
    """
    N, T = D["outs"].shape[:2]
    ratios = []
    for rows in torch.arange(N, device=model.device).split(model.config.batch_size):
        condition = conditions(D, rows)
        total = 0.0
        for k in torch.arange(T, device=model.device):
            x = D["path"][rows, k]
            x_next = D["path"][rows, k + 1].double()
            steps = k.expand(len(rows))
            with torch.no_grad():
                out_ref = model.predict(x, model.step_times[steps], condition, None)
            mean, std = model.solver.gaussian(x, D["outs"][rows, k], steps)
            mean_ref, _ = model.solver.gaussian(x, out_ref, steps)
            old = log_prob(x_next, mean.double(), std.double())
            total = total + old - log_prob(x_next, mean_ref.double(), std.double())
        ratios.append(total * D["x_0"][0].numel())
    return torch.cat(ratios)


def balanced(model, D, temperature):
    """RTB: minus temperature times the residual of each trajectory, for all of its steps.

    The loss is the square of log p_theta - log p_base + log Z - r / temperature, the first two of
    the whole trajectory. It is 0 where images are drawn from p_base exp(r / temperature) / Z. log Z
    is the mean of r / temperature - log p_theta + log p_base over the prompt's K images (VarGrad).
    The gradient of temperature / 2 times the square is -A dlog p_theta, with this A, which is
    r - temperature (log p_theta - log p_base), minus its mean. D["r"]: (N,), r - its mean.
    """
    # As in its code the residual's log p_theta is that of the policy which sampled: theta, for the
    # first of an iteration's updates, and a few steps older for the others. Departs: the code
    # learns log Z, has a replay buffer in some tasks, and averages log p over dimensions in some.
    # The first noise stays N(0, I): so a trajectory's own log Z depends on it, a little.
    ratios = log_ratios(model, D).view(-1, model.config.group_size)
    residual = (ratios - ratios.mean(1, keepdim=True)).flatten()
    A = D["r"] - temperature * residual
    return A.float().view(-1, 1).expand(D["outs"].shape[:2])


# ---- The loss of a step: ratio p_theta / p_old (b,), advantages A (b,), clip range e -> (b,) ----
def clipped_loss(ratio, A, e):
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A): PPO, in FlowGRPO's 4.1, DDPO's D.1 and LOOP."""
    return -torch.minimum(ratio * A, ratio.clamp(1 - e, 1 + e) * A)


def one_sided_loss(ratio, A, e):
    """-clip(ratio, 1 - e, 1 + e) A: DPOK's code clips without PPO's min, also a step gone wrong."""
    return -ratio.clamp(1 - e, 1 + e) * A


def balance_loss(ratio, A, e):
    """-A log p_theta, up to a constant: RTB's squared residual has this gradient, and no clipping.

    It holds for trajectories of any policy, so there is no ratio in it either.
    """
    return -ratio.log() * A


@dataclasses.dataclass
class Method:
    """A row of METHODS."""

    # Rewards -> weights or advantages of the images.
    weigh: Callable
    # Of a step's ratio; None: the weighted denoising loss, and no Gaussian steps.
    loss: Callable | None = None
    # (model, D) -> weights of each image's steps, (N, T); None: all have the image's.
    spread: Callable | None = None
    # What --kl weighs: the squared distance of the outputs, or else the KL of two Gaussians.
    distance_of_outputs: bool = False
    # Of what is weighed by exp(r / temperature), for rewards in [0, 1].
    temperature: float | None = None
    # The share of the sampler's steps, from the first on, that is trained.
    trained: float = 1.0
    # Settings of nft.Config in place of its defaults and the model's. Flags win.
    settings: dict = dataclasses.field(default_factory=dict)


# DDPO's D.1 trains all steps of an image.
ALL_STEPS = {"eta": "0", "train_times": 1000}
METHODS = {
    # KL 0.04 is the paper's for exact rewards. Its code leaves out the last step: 0.99.
    "flowgrpo": Method(
        group_advantages, clipped_loss, trained=0.99, settings=ALL_STEPS | {"kl": 0.04}
    ),
    "ddpo": Method(prompt_advantages, clipped_loss, settings=ALL_STEPS | {"kl": 0.0}),
    # KL 1e-4: its README trains many prompts with 1000 on the reward and 0.1 on the KL. That is
    # KL(p_theta || p_base) of its Lemma 4.2 up to a factor of each step, which its code drops.
    "dpok": Method(
        baseline_advantages,
        one_sided_loss,
        distance_of_outputs=True,
        settings=ALL_STEPS | {"kl": 1e-4},
    ),
    "loop": Method(leave_one_out, clipped_loss, settings=ALL_STEPS | {"kl": 0.0}),
    "coca": Method(
        prompt_advantages, clipped_loss, spread=shared_out, settings=ALL_STEPS | {"kl": 0.0}
    ),
    # The temperature is the weight of KL(p_theta || p_base) in nats; --kl would add to it.
    "rtb": Method(
        baseline_advantages,
        balance_loss,
        spread=balanced,
        temperature=0.01,
        settings=ALL_STEPS | {"kl": 0.0},
    ),
    "rwr": Method(exponential_weights, temperature=0.2, settings={"eta": "0", "kl": 0.0}),
    "rft": Method(positive_weights, settings={"eta": "0", "kl": 0.0}),
}


# ---- Gaussian steps of the reverse process ------------------------------------------------------
def ddim_step(x_0, eps, alpha_bar, alpha_bar_next):
    """Mean and std of x_{t-1} given x_t: DDIM (arXiv 2010.02502), Eq. (12) and (16) at eta = 1.

    x_0, eps: (b, ...), as the denoiser predicts them at x_t. alpha_bar and alpha_bar_next:
    (b, 1, ...), alphas_cumprod at t and at t - 1.
    """
    ratio = alpha_bar / alpha_bar_next
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - ratio)
    direction = (1 - alpha_bar_next - variance).sqrt() * eps
    return alpha_bar_next.sqrt() * x_0 + direction, variance.sqrt()


def flow_step(x_t, v, t, t_next, a, t_max):
    """Mean and std of x at t_next < t given x_t: FlowGRPO Eq. (9), sigma_t = a sqrt(t / (1 - t)).

    x_t, v: (b, ...). t, t_next: (b, 1, ...), t in (0, 1]. t_max < 1 stands for t in 1 - t at t = 1,
    as in FlowGRPO's code.
    """
    # Time falls, so dt is negative.
    dt = t_next - t
    sigma = a * (t / (1 - t.clamp(max=t_max))).sqrt()
    drift = v + sigma**2 / (2 * t) * (x_t + (1 - t) * v)
    return x_t + drift * dt, sigma * (-dt).sqrt()


def log_prob(x, mean, std):
    """log N(x; mean, std^2) averaged over dimensions, as in DDPO's, DPOK's and FlowGRPO's code.

    x, mean: (b, ...). std: (b, 1, ...). Returns (b,). The ratio's spread falls with the number of
    dimensions: --clip-range 1e-4 on SD1.5's 16384 is like 8e-4 on tiny's 256.
    """
    density = -(x - mean).square() / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean, mean_ref, std):
    """KL of two Gaussians of equal std, FlowGRPO Eq. (10), averaged over dimensions: (b,)."""
    return ((mean - mean_ref).square() / (2 * std**2)).flatten(1).mean(1)


def squared_distance(x, y):
    """Mean squared difference of each sample: (b, ...), (b, ...) -> (b,)."""
    return (x - y).square().flatten(1).mean(1)


class GaussianSolver:
    """A solver of diffusers whose steps are drawn from Gaussians and remembered.

    solver: a FlowMatchEulerDiscreteScheduler where prediction is "flow_prediction", else a
    DDIMScheduler; it answers whatever else the pipeline asks. noise_level: a of flow_step. From the
    first step on `levels` (T + 1,) says from which noise level to which the T steps lead: sigma of
    a flow, else alpha_bar. `path` is x (B, ...) of before and after each step, `outs` are the
    denoiser's outputs (B, ...), both in fp32.
    """

    def __init__(self, solver, prediction, noise_level):
        self.solver = solver
        self.prediction = prediction
        self.noise_level = noise_level
        self.begin([])

    def __getattr__(self, name):
        return getattr(self.solver, name)

    def begin(self, noise):
        """Forget all steps. noise: the generators that the next images draw from, one an image."""
        self.noise = noise
        self.path = []
        self.outs = []

    def read_levels(self, device):
        """Take `levels` from the times that the pipeline has set."""
        if self.prediction == "flow_prediction":
            levels = self.solver.sigmas
        else:
            # As in DDPO's code the last step ends at alpha_bar of time 0: its std is not 0.
            times = self.solver.timesteps.cpu()
            step = self.solver.config.num_train_timesteps // len(times)
            end = (times[-1:] - step).clamp_min(0)
            levels = self.solver.alphas_cumprod[torch.cat([times, end]).long()]
        self.levels = levels.float().to(device)

    def gaussian(self, x, out, k):
        """Mean (b, ...) and std (b, 1, ...) of step k (b,) from x, where the denoiser says out."""
        shape = [-1] + [1] * (x.ndim - 1)
        level = self.levels[k].view(shape)
        level_next = self.levels[k + 1].view(shape)
        if self.prediction == "flow_prediction":
            return flow_step(x, out, level, level_next, self.noise_level, t_max=self.levels[1])
        alpha = level.sqrt()
        sigma = (1 - level).sqrt()
        x_0, _ = nft.predict_x0(x, out, alpha, sigma, self.prediction)
        eps = (x - alpha * x_0) / sigma
        return ddim_step(x_0, eps, level, level_next)

    def step(self, model_output, timestep, sample, return_dict=False):
        """One step of the pipeline: a tuple of x (B, ...) at the next time."""
        x = sample.float()
        out = model_output.float()
        if not self.outs:
            self.read_levels(x.device)
            self.path.append(x)
        k = torch.full((len(x),), len(self.outs), device=x.device)
        mean, std = self.gaussian(x, out, k)
        eps = torch.stack([torch.randn(x.shape[1:], generator=one) for one in self.noise])
        x_next = (mean + std * eps.to(x.device)).to(sample.dtype)
        self.outs.append(out)
        self.path.append(x_next.float())
        return (x_next,)


class Chain(nft.Model):
    """A model that samples as a Markov chain of T Gaussian steps, and remembers them.

    `times` are the indices of the trained steps, so nft.optimize draws pairs of an image and a
    step; `step_times` (T,) are the steps' times as the denoiser takes them. Only rollouts, of the
    policy "old", are sampled so: evaluation is by the run's own solver.
    """

    def __init__(self, config, noise_level=0.7, trained=1.0):
        super().__init__(config)
        name = "euler" if self.prediction == "flow_prediction" else "ddim"
        solver = nft.pick_solver(name, self.pipe.scheduler)
        self.solver = GaussianSolver(solver, self.prediction, noise_level)
        # One image, so that the solver learns its times.
        self.sample([""], [("probe",)], "old")
        times = self.solver.timesteps.to(self.device)
        self.step_times = times * self.time_scale
        self.times = torch.arange(max(1, int(trained * len(times))))

    def sample(self, prompts, seeds, policy):
        """As nft.Model.sample, and with the policy "old" the steps as well.

        These are "path", the latents (B, T + 1, ...), and "outs", the denoiser's outputs
        (B, T, ...). The steps' noise comes from the keys in `seeds` with "steps" added.
        """
        if policy != "old":
            return super().sample(prompts, seeds, policy)
        own = self.pipe.scheduler
        self.solver.begin([nft.generator(*seed, "steps") for seed in seeds])
        self.pipe.scheduler = self.solver
        try:
            sampled = super().sample(prompts, seeds, policy)
        finally:
            self.pipe.scheduler = own
        sampled["path"] = torch.stack(self.solver.path, 1)
        sampled["outs"] = torch.stack(self.solver.outs, 1)
        return sampled


# ---- Losses of b pairs, as nft.pair_losses: loss, KL, deviation from the old policy, each (b,) ---
def pair_weights(model, D, index, t, spread):
    """The weights (b,) of pairs of an image and a step; see Method.spread."""
    if spread is None:
        return D["r"][index]
    if "r_of_steps" not in D:
        # Once an iteration, whose pairs share D.
        D["r_of_steps"] = spread(model, D)
    return D["r_of_steps"][index, t.to(model.device)]


def step_losses(model, D, index, t, eps, method, clip_range):
    """Losses of the steps t (b,) of the images index (b,) of a Chain; D["r"] holds advantages."""
    k = t.to(model.device)
    weights = pair_weights(model, D, index, k, method.spread)
    x = D["path"][index, k]
    x_next = D["path"][index, k + 1]
    out_old = D["outs"][index, k]
    condition = conditions(D, index)
    if model.config.kl:
        with torch.no_grad():
            out_ref = model.predict(x, model.step_times[k], condition, None)
    # theta comes last: --checkpointing computes it again, under the policy that was last in use.
    out = model.predict(x, model.step_times[k], condition, "theta")

    mean, std = model.solver.gaussian(x, out, k)
    mean_old, _ = model.solver.gaussian(x, out_old, k)
    ratio = (log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)).exp()
    loss = method.loss(ratio, weights, clip_range)
    if not model.config.kl:
        kl = torch.zeros_like(loss)
    elif method.distance_of_outputs:
        kl = squared_distance(out, out_ref)
    else:
        mean_ref, _ = model.solver.gaussian(x, out_ref, k)
        kl = gaussian_kl(mean, mean_ref, std)
    return loss, kl, squared_distance(out.detach(), out_old)


def denoising_losses(model, D, index, t, eps):
    """What pretraining minimises, times the weights D["r"]: of images noised by eps to times t."""
    x_0 = D["x_0"][index]
    condition = conditions(D, index)
    alpha_t, sigma_t = model.noise_level(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps
    targets = {
        "flow_prediction": eps - x_0,
        "epsilon": eps,
        "v_prediction": alpha_t * eps - sigma_t * x_0,
    }
    if model.config.kl:
        with torch.no_grad():
            out_ref = model.predict(x_t, t, condition, None)
    # theta comes last, as above.
    out = model.predict(x_t, t, condition, "theta")

    loss = D["r"][index] * squared_distance(out, targets[model.prediction])
    kl = torch.zeros_like(loss)
    if model.config.kl:
        kl = squared_distance(out, out_ref)
    return loss, kl, torch.zeros_like(loss)


def without_idle(model, D, index, t, eps, losses, spread):
    """`losses` of the pairs that matter; 0 for the others, which the denoiser does not see.

    Without KL an image of weight 0 adds nothing to the gradient. What a method costs is counted in
    samples through the denoiser, and much of RFT's images and all of a prompt whose rewards are
    equal have weight 0. FlowGRPO's code skips them, too.
    """
    if model.config.kl:
        return losses(model, D, index, t, eps)
    useful = pair_weights(model, D, index, t, spread).nonzero().flatten()
    # A loss of 0 that depends on theta, so that its backward pass works if no pair matters.
    theta = model.lora.adapters["theta"][0]
    nothing = theta.new_zeros(len(index)) + 0 * theta.sum()
    if len(useful) == 0:
        return nothing, nothing.detach(), nothing.detach()
    found = losses(model, D, index[useful], t[useful.to(t.device)], eps[useful])
    return tuple(nothing.index_put((useful,), x) for x in found)


# ---- A method as parts of nft.train --------------------------------------------------------------
class Count:
    """Samples that went through a model's denoiser since: `Count(model).n`.

    With guidance each counts twice, and a forward pass with a backward one counts as one, though it
    costs about three. nft.py's own runs need, an iteration, images * (the sampler's evaluations +
    train_times * 3), for theta, old and base, or 2 where kl is 0.
    """

    def __init__(self, model):
        self.n = 0
        model.net.register_forward_hook(self.add)

    def add(self, net, args, out):
        """The hook: out[0] is (B, ...)."""
        self.n += len(out[0])


def make_model(config, method, noise_level):
    """The model that a Method needs. Raises nft.UserError for settings that it cannot have."""
    if nft.WORLD > 1:
        rule = "must be 1 for a baseline; nft.py alone divides its work"
        raise nft.UserError(f"torchrun with {nft.WORLD} processes: {rule}")
    if config.resume:
        raise nft.UserError("--resume: must not be given for a baseline; begin anew")
    if nft.soft_update_decay(config.iterations, config.eta) != 0:
        rule = "must be 0 for a baseline: theta samples; leave it out"
        raise nft.UserError(f"--eta {config.eta}: {rule}")
    if method.loss and config.guidance != 1:
        rule = "must be 1: a step's probability is the conditional model's alone; leave it out"
        raise nft.UserError(f"--guidance {config.guidance}: {rule}")
    _, dtype = nft.pick_device(config)
    if dtype == torch.float16:
        rule = "must not come to fp16 for a baseline; take bf16 or fp32"
        raise nft.UserError(f"--precision {config.precision}: {rule}")
    if method.loss:
        return Chain(config, noise_level, method.trained)
    return nft.Model(config)


def parts(method, clip_range=1e-4, noise_level=0.7, temperature=None):
    """Keyword arguments of nft.train and nft.main for a method of METHODS, by name.

    clip_range: of the ratio. noise_level: a of flow_step. temperature: of rwr and rtb,
    if not the method's own. Let the run's settings start from METHODS[method].settings.
    """
    row = METHODS[method]
    if temperature is None:
        temperature = row.temperature
    if row.temperature is not None:
        # Of what shares out the weights, where something does.
        name = "spread" if row.spread else "weigh"
        warm = functools.partial(getattr(row, name), temperature=temperature)
        row = dataclasses.replace(row, **{name: warm})
    losses = denoising_losses
    if row.loss:
        losses = functools.partial(step_losses, method=row, clip_range=clip_range)
    return {
        "make_model": functools.partial(make_model, method=row, noise_level=noise_level),
        "weigh": row.weigh,
        "losses": functools.partial(without_idle, losses=losses, spread=row.spread),
    }


# ---- Command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """A parser that raises nft.UserError."""

    def error(self, message):
        raise nft.UserError(f"{message}; see python examples/studies/baselines.py --help")


def positive(word):
    """A word of the command line as a number above 0."""
    number = float(word)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word}: must be a number above 0")
    return number


def parse(argv):
    """(the name of a method, its own settings, the words left for nft.py). Raises nft.UserError."""
    parser = Parser(
        description="Train by another method than DiffusionNFT.",
        epilog="All other flags are those of nft.py: see python nft.py --help",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("method", choices=tuple(METHODS), help="the first word, before all flags")
    clip_range = "of the ratio (1e-4, as DDPO, DPOK, FlowGRPO); tiny latents want 1e-3 to 1e-2"
    parser.add_argument("--clip-range", type=positive, help=clip_range)
    noise_level = "a of a flow's sigma_t = a sqrt(t / (1 - t)), FlowGRPO (0.7)"
    parser.add_argument("--noise-level", type=positive, help=noise_level)
    temperature = "of exp(r / temperature) (rwr 0.2, rtb 0.01, for rewards in [0, 1])"
    parser.add_argument("--temperature", type=positive, help=temperature)
    known, rest = parser.parse_known_args(argv)
    own = vars(known)
    method = own.pop("method")
    row = METHODS[method]
    taken = {
        "clip_range": row.loss in (clipped_loss, one_sided_loss),
        "noise_level": row.loss is not None,
        "temperature": row.temperature is not None,
    }
    for name in own:
        if not taken[name]:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: must be of another method, {method} has none; leave it out")
    return method, own, rest


def main(argv=None, **more):
    """Run a command line, METHOD and flags, with `more` parts of nft.train; the exit status."""
    if argv is None:
        argv = sys.argv[1:]
    try:
        method, own, rest = parse(argv)
    except nft.UserError as error:
        print(f"baselines.py: {error}", file=sys.stderr)
        return 2
    defaults = []
    for name, value in METHODS[method].settings.items():
        flag = name.replace("_", "-")
        defaults.append(f"--{flag}={value}")
    status = nft.main([*defaults, *rest], **parts(method, **own), **more)
    if status not in (0, 2):
        # nft.py's advice is for parts that can go on.
        print(f"baselines.py: a run of {method} cannot go on; begin anew", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
