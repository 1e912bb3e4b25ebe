"""Beside the files of policies: arguments that authors would set for a load, and why a claim fails on it."""

from __future__ import annotations

TRIED: dict[str, tuple[str, ...]] = {
    "layered": ("groups=2", "groups=4"),
    "prepacking": ("bin=1024", "bin=2048"),
    "sarathi": ("chunk=256", "chunk=512", "chunk=1024"),
    "splitfuse": ("budget=512", "budget=1024", "budget=2048"),
    **dict.fromkeys(("contextparallel", "tokenring", "ulysses", "apb"), ("ranks=8",)),
    "lamina": tuple(
        f"flops={n * 312e12}, bytes_s={n * 2039e9}, kv_bytes={n * 80e9}, price_h={n * 1.6}" for n in (3, 4)
    ),
}
"""The best of these counts.  Lamina's are numbers of a100 that hold the KV."""

WHY: dict[str, str] = {
    "layered": "Decodes read all weights in every step here, so that layers in turn save nothing, and a prompt takes as many "
    "steps as there are groups. On a mixture of experts (qwen3-30b-a3b on two h100, prompts of 8,000 tokens, 3 a second) "
    "groups=8 has 0.26 times the time of chunks of 512 rows, as the paper has them, and 1.5 times that of chunks of 2,048",
    "prepacking": "What it saves is padding, of which steps here have none; what is left of it is that a prompt waits for a "
    "bin into which it fits as a whole",
    "priority": "First come, first served takes urgent prompts before others here, too; what is left is that they go before "
    "answers that have begun",
    "sarathi": "The load ends it: 4,105 tokens a second are the most that any order reaches on it, 1.19 times that of orca",
    "sarathi_serve": "The paper's 2.6 is the most of its models and loads (Mistral-7B on one A100, a strict limit)",
    "splitfuse": "The limit is on the mean between an answer's tokens here, which whole prompts hardly stretch. Of single gaps "
    "99 in 100 are within 33 ms at this pace, and within 147 ms with prompts first",
    "power_of_two": "It compares numbers of sequences, and prompts differ in length by far; asking everybody for rows "
    "(least_loaded) comes to 0.75",
    "splitwise": "Against prompts first on every device (13.8) it is 1.49 times",
    "distserve": "Against prompts first on every device (13.8), as in the paper, it is 1.68 times",
    "nexus": "Against prompts first (2.6) it is 1.83 times; the claim is of the best of the paper's loads",
    "accellm": "The claim is of the best of the paper's loads; on this one it is 17 % shorter",
    "tetriinfer": "Against prompts first it is 0.91 times. Spreading answers by their predicted length makes it 2.4 % shorter: a "
    "step reads the same weights for few answers as for many, so that little is lost where they are spread unevenly",
    "afd": "The four devices have 2.7 times the tokens of one h100, which spends 0.62 of its time on KV and 0.29 on weights",
    "shortest": "An order that knows every length (clairvoyant) comes to 0.78 times, so that no order reaches the claim; "
    "the rest of the paper's is its other parts",
    "epd": "It is compared with DistServe at the proportion that is best for images (three of four devices for prompts); "
    "where two are and a request has eight tiles, it is 0.21 times",
    "lamina": "For a dollar these prices give 1.2 times the bandwidth and twice the memory as an a100 that they give as an h100, "
    "and the h100 for the products is paid for beside it",
    "nanoflow": "One device tells nobody anything, so that only reading and arithmetic overlap. llama-2-70b on eight a100 gains "
    "1.13 times; the claim is over engines that lose time elsewhere, too, and roofline loses none",
    "iso": "Sums take 0.28 of the time without it and 0.016 with it, so that nothing more can be hidden. On four "
    "a100, where the paper has 15 % less, it is 0.92 times",
    "tokenring": "Keys and values are a quarter of the queries here, and what the ring passes on is hidden behind "
    "attention as a whole; the last results of TokenRing are not (0.006 of its time). With as many heads of "
    "keys as of queries (llama-2-7b) it is 1.003 times",
    "ulysses": "The claim is of training, over splits that gather whole sequences. What the ring passes on is hidden "
    "behind attention here, and the exchanges are not (0.015 of the time)",
    "apb": "At this length products take half of its time, and the anchors are computed by every host: without them "
    "it is 0.51 times. One host with whole attention takes 12.8 times as long (the paper: up to 9.2)",
    "megatron": "A step of decodes reads a stage's weights once for each of its parts. Of prompts alone (2,000 tokens "
    "each, of which a step holds one or two) two devices have 1.29 times the tokens of one",
    "flexllm": "At this pace requests alone keep the device busy almost all the time; at their own pace 0.75 is trained "
    "beside the first 800 of them, and 0.68 over the whole hour",
}
"""By policy: what other runs of the same simulator say of the reason."""
