"""Make a model smaller and keep its quality: one job from a folder to a folder, made of the package's own parts.

from lightning_peft.compression.job import compress
"""
