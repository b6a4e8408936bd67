"""What a store must survive, as code that tests and `make stress` share: kills, damage, mismatches, races."""
