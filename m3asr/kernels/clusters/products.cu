// The products of a block that all tokens pass: see product.cu.
KERNEL product_activated(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, ACTIVATED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_gated(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, GATED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_keyed(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix out, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, COLUMNS, KEYED>(memory, a_rows, weights, out, out, layer);
}
KERNEL product_added(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix raw, CONSTANT Matrix low, CONSTANT Layer layer
) {
    SHARED(memory);
    product<WIDTH, 64, ADDED>(memory, a_rows, weights, raw, low, layer);
}
KERNEL product_added_from_hidden(
    CONSTANT Matrix a_rows, CONSTANT Matrix weights, CONSTANT Matrix raw, CONSTANT Matrix low, CONSTANT Layer layer
) {
    SHARED(memory);
    product<HIDDEN, 64, ADDED>(memory, a_rows, weights, raw, low, layer);
}
