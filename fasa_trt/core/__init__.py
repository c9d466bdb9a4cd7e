"""The ground floor: the definition of FASA and the artifacts that the stages hand to each other."""
