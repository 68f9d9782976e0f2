"""A shop whose customer is played by a model: ``environment: {class: "examples.shop:Shop", user: {...}}``.

The customer knows which order it is about and what shall become of it, and says so when it is asked. The policy has to
ask, look the order up, and act. What the orders are in the end is the score.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

NAMES = ("Ada", "Ben", "Carla", "Dan", "Ella", "Finn", "Gina", "Hugo")
ITEMS = ("lamp", "kettle", "chair", "radio", "tent", "clock")
CITIES = ("Bath", "Cork", "Derby", "Exeter", "Leeds", "York")
CANCELLED = "cancelled"


def visits(count: int = 200, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield visits of customers, as records of format ``prompt``; a recipe keeps ``goal``, ``orders`` and ``wanted``.

    ``goal`` tells the customer's model what it knows and wants; ``wanted`` is where each order shall be in the end.
    """
    source = random.Random(seed)  # noqa: S311
    for _ in range(count):
        name, items = source.choice(NAMES), source.sample(ITEMS, 2)
        places = source.sample(CITIES, 3)
        numbers = [f"{number}" for number in source.sample(range(1000, 10000), 2)]
        orders = [
            {"number": number, "customer": name, "item": item, "place": place}
            for number, item, place in zip(numbers, items, places[:2], strict=True)
        ]
        wanted = {order["number"]: order["place"] for order in orders}
        if source.random() < 0.5:
            wanted[numbers[0]] = CANCELLED
            wish = f"cancel the order of a {items[0]}"
        else:
            wanted[numbers[0]] = places[2]
            wish = f"have the {items[0]} that you ordered sent to {places[2]}, not to {places[0]}"
        goal = f"Your name is {name}. You want to {wish}. You do not know the number of the order."
        yield {"prompt": "Hello, I need help with an order.", "goal": goal, "orders": orders, "wanted": wanted}


class Shop:
    """Orders of one customer."""

    def reset(self, row: dict[str, Any]) -> None:
        """Open the shop. None: the customer's first message is the row's prompt."""
        self.orders = {order["number"]: dict(order) for order in row["orders"]}
        self.wanted = dict(row["wanted"])

    def find_orders(self, customer: str) -> list[dict[str, Any]] | str:
        """Find the orders of a customer.

        Args:
            customer: First name of the customer.

        Returns:
            The orders, each with its number, item and place.
        """
        name = customer.strip().lower()
        orders = [order for order in self.orders.values() if order["customer"].lower() == name]
        return orders or "There are no orders under this name."

    def cancel_order(self, number: str) -> str:
        """Cancel an order.

        Args:
            number: Number of the order.
        """
        self._order(number)["place"] = CANCELLED
        return "The order is cancelled."

    def send_to(self, number: str, city: str) -> str:
        """Change where an order is sent.

        Args:
            number: Number of the order.
            city: City that it is sent to.
        """
        self._order(number)["place"] = city.strip()
        return f"The order goes to {city.strip()}."

    def score(self) -> dict[str, float]:
        """Return 1 where every order is as the customer wants it."""
        return {"right": float(self.wanted == {number: order["place"] for number, order in self.orders.items()})}

    def state(self) -> dict[str, Any]:
        """Return the orders: a run that was killed cancels none twice."""
        return {"orders": self.orders, "wanted": self.wanted}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.orders, self.wanted = state["orders"], state["wanted"]

    def _order(self, number: str) -> dict[str, Any]:
        if number not in self.orders:
            raise ValueError(f"there is no order {number}")
        return self.orders[number]
