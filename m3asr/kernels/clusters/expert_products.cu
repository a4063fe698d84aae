// Both products of a layer's experts for many tokens, which lie sorted, in tiles of one expert each: see product.cu.
KERNEL experts_up(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer, CONSTANT Sorted sorted
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, ACTIVATED, true>(memory, a_rows, weights, out, out, layer, sorted);
}
KERNEL experts_down(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer, CONSTANT Sorted sorted
) {
    SHARED(memory);
    product<HIDDEN, 64, SCALED, true>(memory, a_rows, weights, out, out, layer, sorted);
}
