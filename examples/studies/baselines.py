"""What DiffusionNFT is compared with: policy gradients on the reverse process, and fine-tuning.

    python examples/studies/baselines.py flowgrpo --model tiny-sd3 --out runs/flowgrpo
    python examples/studies/baselines.py ddpo --out runs/ddpo --clip-range 1e-2 --train-times 5

    method    paper                  weight of an image                 loss
    flowgrpo  arXiv 2505.05470       (r - mean) / std of the prompt's K PPO's, and KL to the base
    ddpo      arXiv 2305.13301       (r - mean) / std of the prompt's K PPO's
    dpok      arXiv 2305.16381       r - mean of the prompt's K         clipped ratio, and distance
    loop      arXiv 2503.00897       r - mean of the other K - 1        PPO's
    coca      arXiv 2505.19196       DDPO's, shared out among the steps PPO's
    rtb       arXiv 2405.20971       r - mean of the prompt's K         trajectory balance
    rwr       arXiv 2305.13301, 4.2  softmax(r / temperature) of the K  denoising
    rft       arXiv 2305.13301, 4.2  1 where r > mean of the K, else 0  denoising

Training is nft.train with a method's own parts, so all else is alike. All of nft.py's flags work;
--beta and --z play no part. --eta is 0 where it is not given: theta samples. In the log `r_std` is
the spread of the weights, and `loss`, `kl` and `grad_norm` are a fifth of the method's (see UNIT).
`kl` is 0 where --kl is 0. `old_deviation` is 0 for rwr and rft, which don't use the old policy.

The first six methods sample by steps that are drawn from a Gaussian (`Chain`), and train on these
steps: on all of them, unless --train-times says fewer. rwr and rft sample and draw noise levels as
nft.py does. rtb needs log p_base of every step: so many samples more go through the denoiser.

All methods depart from their papers where nft.py treats every method alike: learning rate, LoRA, no
guidance, and `updates` optimizer steps an iteration. Comments "Departs" name the rest.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributions import Normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

# These methods' codes clip gradients at norm 1, nft.optimize at 0.2. AdamW's update does not
# depend on the loss's size, but for its epsilon: so a fifth of a loss, clipped at 0.2, is theirs.
UNIT = 5
# FlowGRPO's a, in sigma_t = a sqrt(t / (1 - t)) of a flow.
NOISE = 0.7


# ---- The weight of each image: rewards (prompts, K) in float64 -> weights of that shape ----------
def centred(rewards):
    """r - mean of the prompt's K images, as a baseline of policy gradients."""
    # Departs from DPOK, which learns its baseline as a function of (x_t, prompt).
    return rewards - rewards.mean(1, keepdim=True)


def standardized(rewards, added, limit):
    """(r - mean) / (std + added) of the prompt's K images, within +-limit."""
    std = rewards.std(1, correction=0, keepdim=True)
    return (centred(rewards) / (std + added)).clamp(-limit, limit)


def group_advantages(rewards):
    """FlowGRPO, section 4.1: (r - mean) / std of the prompt's K images.

    The 1e-4 and the limit 5 are its code's. The authors' runs divide by the std of all rewards
    (`global_std`); the paper, and so this, by the prompt's.
    """
    return standardized(rewards, added=1e-4, limit=5)


def prompt_advantages(rewards):
    """DDPO, appendix D.3: (r - mean) / std of the prompt's rewards; 1e-6 and 10 are its code's."""
    # Departs: D.3 takes a prompt's last 32 rewards. Here these are the K images of the iteration:
    # the 960 prompts of examples/tiny return only after 60 iterations of 16.
    return standardized(rewards, added=1e-6, limit=10)


def leave_one_out(rewards):
    """LOOP: r - mean of the prompt's other K - 1 rewards, so that the baseline has no bias."""
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def shared_out(rewards, measured):
    """CoCA: an image's advantage, shared out among its steps by what each brings: (prompts, K, T).

    measured: `similarities` s (N, T); s after the last step is 1. Step k gains s_{k+1} - s_k, and
    its share is this over the sum of all gains, 1 - s_0. What counts for a step is its own share
    and those of the steps after it: (1 - s_k) / (1 - s_0) of the advantage, which is all of it for
    the first step. These are standardized once more over the prompt's images and steps.
    """
    # Departs: the code averages s over windows of 5 of 50 steps, one of the ten here; its second
    # standardization mixes several iterations, and where a prompt has few images all prompts. The
    # first one's limit is DDPO's 10, not 5. Of the paper the abstract was read, and the code.
    s = measured.double()
    to_go = (1 - s) / (1 - s[:, :1]).clamp_min(1e-6)
    earned = prompt_advantages(rewards).unsqueeze(2) * to_go.view(*rewards.shape, -1)
    return standardized(earned.flatten(1), added=1e-6, limit=5).view_as(earned)


def balanced(rewards, measured, temperature):
    """RTB: minus temperature times the residual of each trajectory.

    measured: `log_ratios` (N,). The loss is the square of log p_theta - log p_base + log Z -
    r / temperature, the first two of the whole trajectory. It is 0 where images are drawn from
    p_base exp(r / temperature) / Z. log Z is the mean of r / temperature - log p_theta + log p_base
    over the prompt's K images (VarGrad). The gradient of temperature / 2 times the square is
    -A dlog p_theta, with this A: r - temperature (log p_theta - log p_base), minus its mean.
    """
    # As in its code the residual's log p_theta is that of the policy which sampled: theta, for the
    # first of an iteration's updates, and a few steps older for the others. Departs: the code
    # learns log Z, has a replay buffer in some tasks, and averages log p over dimensions in some.
    # The first noise stays N(0, I): so a trajectory's own log Z depends on it, a little.
    return centred(rewards - temperature * measured.view_as(rewards))


def exponential_weights(rewards, temperature):
    """RWR, DDPO's section 4.2: exp(r / temperature) / Z, where a prompt's K weights average 1."""
    return rewards.shape[1] * (rewards / temperature).softmax(1)


def positive_weights(rewards):
    """RFT, DDPO's section 4.2: w_sparse = 1 where r >= C, else 0."""
    # Departs: C lies just above the prompt's mean, where D.2 and D.3 keep a prompt's best tenth.
    # So an exact reward keeps all right images, and equal images teach nothing.
    return rewards > rewards.mean(1, keepdim=True)


# ---- What a method must know of a Chain's B images: (model, its sample) -> (B, ...) --------------
def similarities(model, sampled):
    """Cosine similarity of x_0 to the clean image that is predicted at each step: (B, T)."""
    x_0 = sampled["x_0"]
    columns = []
    for k, t in enumerate(model.step_times):
        alpha_t, sigma_t = model.noise_level(t.expand(len(x_0)), x_0.ndim)
        x_t = sampled["path"][:, k]
        out = sampled["outs"][:, k]
        x0_hat, _ = nft.predict_x0(x_t, out, alpha_t, sigma_t, model.prediction)
        columns.append(F.cosine_similarity(x0_hat.flatten(1), x_0.flatten(1)))
    return torch.stack(columns, 1)


def log_ratios(model, sampled):
    """log p_old(trajectory) - log p_base(trajectory) of each image, in nats: (B,), in float64."""
    total = 0.0
    for k, t in enumerate(model.step_times):
        x = sampled["path"][:, k]
        x_next = sampled["path"][:, k + 1].double()
        out = sampled["outs"][:, k]
        out_ref = model.predict(x, t.expand(len(x)), sampled["condition"], None)
        mean, std = model.solver.gaussian(x, out, k)
        mean_ref, _ = model.solver.gaussian(x, out_ref, k)
        total += log_prob(x_next, mean.double(), std.double())
        total -= log_prob(x_next, mean_ref.double(), std.double())
    return total * x_next[0].numel()


# ---- The loss of a step: ratio p_theta / p_old (b,), advantages A (b,), clip range e -> (b,) -----
def clipped_loss(ratio, A, e):
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A): PPO, in FlowGRPO's 4.1, DDPO's D.1 and LOOP."""
    return -torch.minimum(ratio * A, ratio.clamp(1 - e, 1 + e) * A)


def one_sided_loss(ratio, A, e):
    """-clip(ratio, 1 - e, 1 + e) A: DPOK's code clips without PPO's min, also a step gone wrong."""
    return -ratio.clamp(1 - e, 1 + e) * A


def balance_loss(ratio, A, e):
    """-A log p_theta, up to a constant: RTB's, for trajectories of any policy, without clipping."""
    return -ratio.log() * A


# ---- Gaussian steps of the reverse process -------------------------------------------------------
def ddim_step(x_0, eps, alpha_bar, alpha_bar_next):
    """Mean and std of x_{t-1} given x_t: DDIM (arXiv 2010.02502), Eq. (12) and (16) at eta = 1.

    x_0, eps: (b, ...), as the denoiser predicts them at x_t. alpha_bar and alpha_bar_next:
    (b, 1, ...), alphas_cumprod at t and at t - 1.
    """
    ratio = alpha_bar / alpha_bar_next
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - ratio)
    direction = (1 - alpha_bar_next - variance).sqrt() * eps
    return alpha_bar_next.sqrt() * x_0 + direction, variance.sqrt()


def flow_step(x_t, v, t, t_next, t_max, a=NOISE):
    """Mean and std of x at t_next < t given x_t: FlowGRPO Eq. (9), sigma_t = a sqrt(t / (1 - t)).

    x_t, v: (b, ...). t, t_next: (b, 1, ...), t in (0, 1]. t_max < 1 stands for t in 1 - t at t = 1,
    as in FlowGRPO's code.
    """
    # Time falls, so dt is negative.
    dt = t_next - t
    sigma = a * (t / (1 - t.clamp(max=t_max))).sqrt()
    drift = v + sigma**2 / (2 * t) * (x_t + (1 - t) * v)
    return x_t + drift * dt, sigma * (-dt).sqrt()


def squared_distance(x, y):
    """Mean squared difference of each sample: (b, ...), (b, ...) -> (b,)."""
    return (x - y).square().flatten(1).mean(1)


def log_prob(x, mean, std):
    """log N(x; mean, std^2) averaged over dimensions, as in DDPO's, DPOK's and FlowGRPO's code.

    x, mean: (b, ...). std: (b, 1, ...). Returns (b,). The ratio's spread falls with the number of
    dimensions: --clip-range 1e-4 on SD1.5's 16384 is like 8e-4 on tiny's 256.
    """
    return Normal(mean, std).log_prob(x).flatten(1).mean(1)


def gaussian_kl(mean, mean_ref, std):
    """KL of two Gaussians of equal std, FlowGRPO Eq. (10), averaged over dimensions: (b,)."""
    return squared_distance(mean, mean_ref) / (2 * std.flatten() ** 2)


class GaussianSolver:
    """A solver of diffusers whose T steps are drawn from Gaussians.

    solver: a FlowMatchEulerDiscreteScheduler where prediction is "flow_prediction", else a
    DDIMScheduler; it answers whatever else the pipeline asks.
    """

    def __init__(self, solver, prediction):
        self.solver = solver
        self.prediction = prediction

    def __getattr__(self, name):
        return getattr(self.solver, name)

    def levels(self):
        """The noise levels (T + 1,) around the steps: sigma of a flow, else alpha_bar."""
        if self.prediction == "flow_prediction":
            return self.solver.sigmas
        # As in DDPO's code the last step ends at alpha_bar of time 0: its std is not 0.
        times = self.solver.timesteps.cpu()
        step = self.solver.config.num_train_timesteps // len(times)
        end = (times[-1:] - step).clamp_min(0)
        return self.solver.alphas_cumprod[torch.cat([times, end]).long()]

    def gaussian(self, x, out, k):
        """Mean and std (b, 1, ...) of step k, one or (b,), from x (b, ...); out: the denoiser's."""
        levels = self.levels().to(x)
        shape = [-1] + [1] * (x.ndim - 1)
        level = levels[k].view(shape)
        level_next = levels[k + 1].view(shape)
        if self.prediction == "flow_prediction":
            return flow_step(x, out, level, level_next, t_max=levels[1])
        alpha = level.sqrt()
        sigma = (1 - level).sqrt()
        x_0, _ = nft.predict_x0(x, out, alpha, sigma, self.prediction)
        eps = (x - alpha * x_0) / sigma
        return ddim_step(x_0, eps, level, level_next)

    def step(self, model_output, timestep, sample, generator=None, return_dict=False):
        """One step of the pipeline: (x (B, ...) at the next time,). generator: a list of B."""
        k = self.solver.timesteps.tolist().index(timestep.item())
        mean, std = self.gaussian(sample.float(), model_output.float(), k)
        eps = torch.stack([torch.randn(sample.shape[1:], generator=own) for own in generator])
        x_next = mean + std * eps.to(sample.device)
        return (x_next.to(sample.dtype),)


class Chain(nft.Model):
    """A model that samples as a Markov chain of T Gaussian steps, and tells of them.

    `times` are the indices of the trained steps, so nft.optimize draws pairs of an image and a
    step; `step_times` (T,) are the steps' times as the denoiser takes them. Only rollouts, of the
    policy "old", are sampled so: evaluation is by the run's own solver.
    """

    def __init__(self, config, untrained=0, measure=None):
        super().__init__(config)
        self.measure = measure
        name = "euler" if self.prediction == "flow_prediction" else "ddim"
        solver = nft.pick_solver(name, self.pipe.scheduler)
        self.solver = GaussianSolver(solver, self.prediction)
        # One image tells how many steps there are.
        self.sample([""], [("check", 0)], "old")
        self.times = torch.arange(len(self.step_times) - untrained)

    @torch.no_grad()
    def sample(self, prompts, keys, policy):
        """As nft.Model.sample, and with the policy "old", in fp32, "path", the latents
        (B, T + 1, ...), "outs", the denoiser's outputs (B, T, ...), and what `measure` says."""
        if policy != "old":
            return super().sample(prompts, keys, policy)
        own = self.pipe.scheduler
        self.pipe.scheduler = self.solver
        try:
            sampled = super().sample(prompts, keys, policy)
        finally:
            self.pipe.scheduler = own
        path, times, _, outs = zip(*self.calls, strict=True)
        self.step_times = torch.cat(times).to(self.device)
        sampled["path"] = torch.stack([*path, sampled["x_0"]], 1).float()
        sampled["outs"] = torch.stack(outs, 1).float()
        if self.measure:
            sampled["measured"] = self.measure(self, sampled)
        return sampled


# ---- Losses of b pairs, as nft.pair_losses: loss, KL, deviation from the old policy, each (b,) ---
def outputs(model, x_t, t, condition):
    """The denoiser's outputs by theta and by the base; without KL the former, twice."""
    if model.config.kl:
        with torch.no_grad():
            out_ref = model.predict(x_t, t, condition, None)
    # theta comes last: --checkpointing computes it again, under the policy that was last in use.
    out = model.predict(x_t, t, condition, "theta")
    if not model.config.kl:
        out_ref = out.detach()
    return out, out_ref


def step_losses(model, pairs, k, method):
    """Losses of the steps k (b,) of a Chain's images; pairs["r"] (b,) holds their advantages."""
    rows = torch.arange(len(k), device=k.device)
    x = pairs["path"][rows, k]
    x_next = pairs["path"][rows, k + 1]
    out_old = pairs["outs"][rows, k]
    out, out_ref = outputs(model, x, model.step_times[k], pairs["condition"])
    mean, std = model.solver.gaussian(x, out, k)
    mean_old, _ = model.solver.gaussian(x, out_old, k)
    mean_ref, _ = model.solver.gaussian(x, out_ref, k)
    ratio = (log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)).exp()
    loss = method.loss(ratio, pairs["r"], method.clip_range)
    kl = gaussian_kl(mean, mean_ref, std)
    if method.distance_of_outputs:
        kl = squared_distance(out, out_ref)
    return loss, kl, squared_distance(out.detach(), out_old)


def denoising_losses(model, pairs, t, eps):
    """What pretraining minimises, times pairs["r"]: of images noised by eps to times t (b,)."""
    x_0 = pairs["x_0"]
    alpha_t, sigma_t = model.noise_level(t, x_0.ndim)
    targets = {
        "flow_prediction": eps - x_0,
        "epsilon": eps,
        "v_prediction": alpha_t * eps - sigma_t * x_0,
    }
    out, out_ref = outputs(model, alpha_t * x_0 + sigma_t * eps, t, pairs["condition"])
    loss = pairs["r"] * squared_distance(out, targets[model.prediction])
    return loss, squared_distance(out, out_ref), torch.zeros_like(loss)


# ---- A method, and its parts of nft.train --------------------------------------------------------
@dataclasses.dataclass
class Method:
    """A row of METHODS. Its methods are parts of nft.train."""

    # Rewards -> weights or advantages of the images, or of their steps.
    advantages: Callable
    # Of a step's ratio; None: the weighted denoising loss, and no Gaussian steps.
    loss: Callable | None = None
    # What `advantages` must know of the trajectories, beside the rewards.
    measure: Callable | None = None
    # What --kl weighs: the squared distance of the outputs, or else the KL of two Gaussians.
    distance_of_outputs: bool = False
    # Of what is weighed by exp(r / temperature), for rewards in [0, 1].
    temperature: float | None = None
    # Of the ratio.
    clip_range: float = 1e-4
    # How many of the sampler's last steps are not trained.
    untrained: int = 0
    # Settings of nft.Config in place of its defaults and the model's. Flags win.
    settings: dict = dataclasses.field(default_factory=dict)
    # What `measure` said of the iteration's images.
    measured: torch.Tensor | None = None

    def make_model(self, config):
        """The model that the method needs. Raises nft.UserError."""
        if not self.loss:
            return nft.Model(config)
        if config.guidance != 1:
            rule = "must be 1: a step's probability is the conditional model's alone; leave it out"
            raise nft.UserError(f"--guidance {config.guidance}: {rule}")
        return Chain(config, self.untrained, self.measure)

    def collect(self, model, rewards, numbered, key, policy):
        """nft.collect; what was measured, of the images of all processes, is kept for `weigh`."""
        D = nft.collect(model, rewards, numbered, key, policy)
        if self.measure:
            self.measured = torch.cat(nft.gather(D.pop("measured")))
        return D

    def weigh(self, raw, groups, z):
        """Weights of the images, (N,), or of their steps, (N, T), from rewards (N,)."""
        # K images of a prompt follow each other. In float64 the mean of equal rewards is exact.
        rewards = raw.double().view(len(groups.unique()), -1)
        given = {"temperature": self.temperature, "measured": self.measured}
        known = {name: value for name, value in given.items() if value is not None}
        return self.advantages(rewards, **known).flatten(0, 1).float()

    def losses(self, model, pairs, t, eps):
        """As nft.pair_losses, for images and times, or steps, t (b,); loss and KL by UNIT.

        Without KL the denoiser sees no pair of weight 0, which adds nothing to the gradient: many
        of RFT's images, and all of a prompt with equal rewards. FlowGRPO's code skips them, too.
        """
        rows = torch.arange(len(t), device=t.device)
        r = pairs["r"]
        if r.ndim == 2:
            r = r[rows, t]
        if not model.config.kl:
            rows = r.nonzero().flatten()
        # A loss of 0 that can be differentiated, also if no pair matters.
        nothing = torch.zeros_like(r, requires_grad=True)
        if len(rows) == 0:
            return nothing, nothing.detach(), nothing.detach()
        pairs = nft.map_tensors(lambda x: x[rows], pairs | {"r": r})
        if self.loss:
            found = step_losses(model, pairs, t[rows], self)
        else:
            found = denoising_losses(model, pairs, t[rows], eps[rows])
        loss, kl, deviation = [nothing.index_put((rows,), x) for x in found]
        return loss / UNIT, kl / UNIT, deviation


# DDPO's D.1 trains all steps of an image.
ALL_STEPS = {"eta": "0", "train_times": 1000, "kl": 0.0}
METHODS = {
    # KL 0.04 is the paper's for exact rewards. Its code leaves out the last step.
    "flowgrpo": Method(
        group_advantages, clipped_loss, untrained=1, settings=ALL_STEPS | {"kl": 0.04}
    ),
    "ddpo": Method(prompt_advantages, clipped_loss, settings=ALL_STEPS),
    # KL 1e-4: its README trains many prompts with 1000 on the reward and 0.1 on the KL. That is
    # KL(p_theta || p_base) of its Lemma 4.2 up to a factor of each step, which its code drops.
    "dpok": Method(
        centred, one_sided_loss, distance_of_outputs=True, settings=ALL_STEPS | {"kl": 1e-4}
    ),
    "loop": Method(leave_one_out, clipped_loss, settings=ALL_STEPS),
    "coca": Method(shared_out, clipped_loss, similarities, settings=ALL_STEPS),
    # The temperature is the weight of KL(p_theta || p_base) in nats; --kl would add to it.
    "rtb": Method(balanced, balance_loss, log_ratios, temperature=0.01, settings=ALL_STEPS),
    "rwr": Method(exponential_weights, temperature=0.2, settings={"eta": "0", "kl": 0.0}),
    "rft": Method(positive_weights, settings={"eta": "0", "kl": 0.0}),
}


def parts(method, **own):
    """Keyword arguments of nft.train and nft.main for a method of METHODS, by name.

    own: clip_range and temperature, if not the method's own. Let the run's settings
    start from METHODS[method].settings.
    """
    row = dataclasses.replace(METHODS[method], **own)
    return {name: getattr(row, name) for name in ("make_model", "collect", "weigh", "losses")}


class Count:
    """Samples that went through a model's denoiser since: Count(model).n; with guidance twice."""

    def __init__(self, model):
        self.n = 0
        model.net.register_forward_hook(self.add)

    def add(self, net, args, out):
        """The hook: out[0] is (B, ...)."""
        self.n += len(out[0])


# ---- Command line --------------------------------------------------------------------------------
def parse(argv=None):
    """(the name of a method, its own settings, the words left for nft.py)."""
    epilog = "All other flags are those of nft.py: see python nft.py --help"
    parser = argparse.ArgumentParser(description="Train by another method.", epilog=epilog)
    methods = parser.add_subparsers(dest="method", required=True)
    for name, row in METHODS.items():
        # A flag that is none of the method's is left for nft.py, which refuses it.
        flags = methods.add_parser(name, allow_abbrev=False)
        if row.loss in (clipped_loss, one_sided_loss):
            text = "of the ratio (1e-4); tiny latents want 1e-3 to 1e-2"
            flags.add_argument("--clip-range", type=float, default=row.clip_range, help=text)
        if row.temperature:
            text = f"of exp(r / temperature), for rewards in [0, 1] ({row.temperature})"
            flags.add_argument("--temperature", type=float, default=row.temperature, help=text)
    known, rest = parser.parse_known_args(argv)
    own = vars(known)
    return own.pop("method"), own, rest


def main(argv=None):
    """Run a command line, METHOD and flags; returns nft.main's exit status."""
    method, own, rest = parse(argv)
    defaults = []
    for name, value in METHODS[method].settings.items():
        flag = name.replace("_", "-")
        defaults.append(f"--{flag}={value}")
    return nft.main([*defaults, *rest], **parts(method, **own))


if __name__ == "__main__":
    sys.exit(main())
