"""The cost model against figures that other engines published or were measured at; see `__main__`."""
