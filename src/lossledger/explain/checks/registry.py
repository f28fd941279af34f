"""Every rule, in the order of its findings."""

from __future__ import annotations

from lossledger.explain.checks import classes, epochs, reducing, shapes, spaces, terms, values, weights
from lossledger.explain.checks.finding import Rule

RULES: tuple[Rule, ...] = (
    Rule("SHAPE1", "shapes that the loss refuses", "batch", shapes.refused_shapes),
    Rule("SHAPE2", "every prediction compared with every target", "batch", shapes.all_pairs),
    Rule("AXIS1", "class axis that is another one, or ambiguous", "batch", shapes.ambiguous_axis),
    Rule("SPACE1", "probabilities given to a loss of logits", "batch", spaces.probabilities_as_logits),
    Rule("SPACE2", "logits given to a loss of probabilities", "batch", spaces.logits_as_probabilities),
    Rule("SPACE3", "exclusive classes whose probabilities do not sum to 1", "batch", spaces.rows_do_not_sum),
    Rule("FLOOR1", "loss at the floor of its label smoothing", "arrays", spaces.smoothing_floor),
    Rule("FLOOR2", "output that does not depend on the sample", "arrays", spaces.same_output_for_all),
    Rule("FLOOR2", "loss of the base rate after several epochs", "epoch", epochs.base_rate),
    Rule("RED1", "sum whose size follows the batch", "batch", reducing.declared_sum),
    Rule("RED2", "scalar that is a sum and is taken for a mean", "batch", reducing.scalar_that_sums),
    Rule("RED3", "loss that compares the samples of a batch", "batch", reducing.coupled_samples),
    Rule("DEN1", "weights of 0 and 1 used as a mask", "batch", reducing.weights_as_mask),
    Rule("DEN2", "nothing or nearly nothing counts", "batch", reducing.nothing_counts),
    Rule("W1", "weights that cancel", "batch", weights.weights_cancel),
    Rule("W2", "weights for a loss that returns one number", "batch", weights.scalar_with_weights),
    Rule("W3", "weights that change the size of the loss", "batch", weights.weights_change_scale),
    Rule("W4", "class weights that move the optimum of smoothed labels", "batch", weights.smoothing_with_class_weights),
    Rule("GA1", "micro-batches averaged as if they counted the same", "arrays", reducing.mean_of_means),
    Rule("GA2", "accumulated gradient that is not that of the batch", "arrays", reducing.parts_do_not_add),
    Rule("SCALE1", "another program's number times a factor", "arrays", reducing.logged_factor),
    Rule("TERM1", "term below 1 % or above 95 % of the loss", "arrays", terms.value_share),
    Rule("TERM1", "term below 1 % or above 95 % in every epoch", "epoch", epochs.value_share),
    Rule("TERM2", "term below 1 % or above 95 % of the gradient", "arrays", terms.gradient_share),
    Rule("TERM3", "terms in different units", "batch", terms.units),
    Rule("NAN1", "values that are not finite", "batch", values.not_finite_values),
    Rule("NAN2", "mask that leaves values that are not finite", "batch", values.mask_leaves_values),
    Rule("NAN3", "finite loss with a gradient that is not", "batch", values.gradient_not_finite),
    Rule("CLS1", "few entries and most of the loss", "arrays", classes.owning_class),
    Rule("CLS1", "few entries and most of the loss, for epochs", "epoch", epochs.owning_class),
    Rule("CLS2", "rare class hidden in the mean", "arrays", classes.hidden_class),
    Rule("CLS2", "rare class hidden in the mean, for epochs", "epoch", epochs.hidden_class),
    Rule("CLS3", "classes that never occur", "arrays", classes.absent_class),
    Rule("CLS3", "classes that never occur in an epoch", "epoch", epochs.absent_class),
    Rule("REC1", "training and validation weighed differently", "epoch", epochs.recipes_differ),
    Rule("DUP1", "samples counted twice", "arrays", values.repeated_tail),
    Rule("PREC1", "values in half precision", "batch", values.low_precision),
    Rule("TOK1", "samples without any target", "batch", values.samples_without_targets),
    Rule("TOK2", "end of a sequence that is never a target", "arrays", values.end_never_a_target),
)

CODES = tuple(dict.fromkeys(rule.code for rule in RULES))
FAMILIES = tuple(dict.fromkeys(rule.family for rule in RULES))
