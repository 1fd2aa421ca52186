"""Names of losses and of strategies for the temperature; without torch, for the options."""

LOSSES = ("kld", "nll", "mse")
STRATEGIES = ("normkd", "wttm", "adakd-sd", "adakd-h")
