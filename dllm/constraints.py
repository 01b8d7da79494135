"""x"""
from typing import Protocol


class Constraint(Protocol):
    pass
