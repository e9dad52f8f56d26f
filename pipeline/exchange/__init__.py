"""Mixtures from and for other toolkits."""
