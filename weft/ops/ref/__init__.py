"""The operations in plain torch: the specification that every other implementation is compared with."""
