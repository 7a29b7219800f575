"""One PPO update as the papers have it, in plain PyTorch, row by row."""

import math

import torch

from rlhf_trl.ppo.seeds import permutation
from tests.helpers.ppo import completion_of, score

LAMBDA_LR, LAMBDA_MAX, WINDOW = 0.1, 5.0, 12


def forward(model, critic, head, rows, temperature):
    """Per row: log-probabilities of its completion tokens, and values before them. No padding anywhere."""
    out = []
    for prompt, completion, inputs in rows:
        given = {"input_ids": torch.tensor([prompt + completion]), "output_hidden_states": True} | inputs
        result = model(**given)
        seen = result if critic is model else critic(**given)
        logits = result.logits[0, len(prompt) - 1 : -1] / temperature
        values = head(seen.hidden_states[-1][0, len(prompt) - 1 : -1])  # a column for each signal
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        out.append((logp, values))
    return out


def length_cost(completions):
    """By how much each completion is longer than three words, the cost of the constraint `words <= 3`."""
    return [len(text.split()) - 3.0 for text in completions]


def read_text(tokenizer, prompt):
    """Return the ids of a prompt and of its completion, and no other inputs."""
    return tokenizer(prompt)["input_ids"], completion_of(tokenizer, prompt), {}


def reference_ppo(policy, reference, critic, head, asked, args, tokenizer, constrained=False, read=read_text):
    """
    PPO as the papers have it, row by row, over the given rollouts. Trains the networks it is given (`critic` may be
    `policy`) and returns the gradient norms, and the KL and the multiplier of each rollout.

    With `constrained` there is a second signal (Safe RLHF, arXiv 2310.12773): a cost with values of its own, which the
    KL adds to, and whose advantage a multiplier subtracts.
    """
    multiplier, multipliers, window = 1.0, [], []
    networks = torch.nn.ModuleList([policy, critic, head])
    parameters = [p for p in networks.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=args.adam_epsilon, weight_decay=0.0
    )
    norms, kls = [], []
    for index, batch in enumerate(asked):
        rows = [read(tokenizer, p) for p in batch]
        with torch.no_grad():
            old = forward(policy, critic, head, rows, args.temperature)
            ref = forward(reference, reference, head, rows, args.temperature)
        texts = [tokenizer.decode(c, skip_special_tokens=True) for _, c, _ in rows]
        signals = list(zip(score(texts), length_cost(texts), strict=True))
        if constrained:
            window = (window + [cost for _, cost in signals])[-max(len(signals), WINDOW) :]
            multiplier = min(multiplier * math.exp(LAMBDA_LR * multiplier * sum(window) / len(window)), LAMBDA_MAX)
            multipliers.append(multiplier)
        advantages, returns = [], []
        for (_, completion, _), (logp, values), (ref_logp, _), (s, cost) in zip(rows, old, ref, signals, strict=True):
            if args.missing_eos_penalty and completion[-1] != tokenizer.eos_token_id:
                s -= args.missing_eos_penalty
            d = logp - ref_logp
            kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[args.kl_estimator]
            reward = torch.stack([-args.beta * kl, args.beta * kl], dim=1)[:, : values.size(1)]
            reward[-1] += torch.tensor([s, cost])[: values.size(1)]
            advantage = torch.zeros_like(reward)
            carried = next_value = 0.0
            for t in reversed(range(len(reward))):
                delta = reward[t] + args.gamma * next_value - values[t]
                carried = delta + args.gamma * args.lam * carried
                advantage[t], next_value = carried, values[t]
            returns.append(advantage + values)
            if constrained:
                advantages.append((advantage[:, 0] - multiplier * advantage[:, 1]) / (1 + multiplier))
            else:
                advantages.append(advantage[:, 0])
        kls.append(sum((o[0] - r[0]).sum().item() for o, r in zip(old, ref, strict=True)) / len(rows))
        flat = torch.cat(advantages)
        mean, std = flat.mean(), torch.sqrt(flat.var(unbiased=False) + 1e-8)
        advantages = [(a - mean) / std for a in advantages]
        size = len(rows) // args.num_mini_batches
        for epoch in range(args.num_iterations):
            order = permutation(len(rows), args.seed, index, epoch).tolist()
            for start in range(0, len(rows), size):
                chosen = order[start : start + size]
                new = forward(policy, critic, head, [rows[i] for i in chosen], args.temperature)
                tokens = sum(len(rows[i][1]) for i in chosen)
                loss = 0.0
                for (logp, values), i in zip(new, chosen, strict=True):
                    ratio = torch.exp(logp - old[i][0])
                    a, r, old_v = advantages[i], returns[i], old[i][1]
                    surrogate = torch.min(ratio * a, ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * a)
                    clipped = old_v + (values - old_v).clamp(-args.cliprange_value, args.cliprange_value)
                    value = 0.5 * torch.max((values - r) ** 2, (clipped - r) ** 2).sum(dim=1)
                    loss = loss + (-surrogate + args.vf_coef * value).sum() / tokens
                optimizer.zero_grad()
                loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
                optimizer.step()
    return norms, kls, multipliers


def same(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def moved(before, after):
    return any(not torch.allclose(before[name], after[name], atol=1e-4) for name in after)
