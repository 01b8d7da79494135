// The operators of the compiled extension, all in its namespace (library.h). The Python packages wrap them; shapes and
// settings are checked there.
#include "library.h"

DLLM_LIBRARY(m) {
  // topk_unmask.cpp. confidence: 0 prob, 1 margin, 2 entropy, 3 random. top_k 0 and top_p 1: no filter. index [M] int64:
  // the rows of the logits. uniform [M, 2] float64, allowed [M, ceil(V / 32)] int32 bits. hidden [M, D] fp32.
  m.def(
      "score_rows_cpu(Tensor logits, Tensor? index, Tensor? uniform, Tensor? allowed, Tensor(a!) token, "
      "Tensor(b!) score, int confidence, float temperature, int top_k, float top_p, bool raw) -> ()");
  m.def(
      "linear_score_rows_cpu(Tensor hidden, Tensor weight, Tensor? bias, Tensor? uniform, Tensor? allowed, "
      "Tensor(a!) token, Tensor(b!) score, int confidence, float temperature, bool raw) -> ()");
  // topk_unmask.cu. rows [n] int64: those of the logits to score; at -1 the score is -infinity, past the last row NaN. top_k V and
  // top_p infinity: no filter. tokens, masked, token, confidence, filled, committed [B, L], k [B], uniform [B, L, 2].
  m.def(
      "score_rows_cuda(Tensor logits, Tensor? rows, Tensor? uniform, Tensor? allowed, Tensor(a!) token, Tensor(b!) score, "
      "int confidence, float temperature, bool filtered, int top_k, float top_p, bool raw) -> ()");
  m.def("find_rows_cuda(Tensor tokens, int mask_token_id, bool packed, Tensor(a!) masked, Tensor(b!) rows) -> ()");
  m.def(
      "commit_cuda(Tensor tokens, Tensor masked, Tensor token, Tensor confidence, Tensor k, Tensor? uniform, "
      "float temperature, float? threshold, Tensor(a!) filled, Tensor(b!) committed) -> ()");
  // linear.cpp. logits [M, V] = hidden [M, D] fp32 times weight [V, D], for few rows.
  m.def("linear_rows_cpu(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) logits) -> ()");
  // denoiser_statistics.cpp. hidden [M, D] fp32, weight [V, D], temperature [M] fp32, uniform [M] float64, softcap 0: none;
  // token and argmax [M] int64, entropy and log_normaliser [M] fp32, soft [M, D] fp32.
  m.def(
      "denoiser_statistics_cpu(Tensor hidden, Tensor weight, Tensor temperature, Tensor uniform, float softcap, "
      "Tensor(a!) token, Tensor(b!) argmax, Tensor(c!) entropy, Tensor(d!) log_normaliser, Tensor(e!)? soft) -> ()");
  // masked_cross_entropy.cpp. Rows [M] int64 of logits [N, V]: targets [N] int64, the other numbers [N] fp32, and grad
  // [N, V] of the logits' dtype are read and written there only. softcap 0: none.
  m.def(
      "cross_entropy_statistics_cpu(Tensor logits, Tensor rows, Tensor targets, float softcap, Tensor(a!) top, "
      "Tensor(b!) total, Tensor(c!) target_logit) -> ()");
  m.def(
      "cross_entropy_gradients_cpu(Tensor logits, Tensor rows, Tensor targets, float softcap, Tensor top, "
      "Tensor probability_scale, Tensor target_scale, Tensor(a!) grad) -> ()");
  // masked_cross_entropy.cu. All rows of logits [N, V], of which those not corrupted are neither read nor, in the
  // gradient, anything but zero; grad may be the logits themselves.
  m.def(
      "cross_entropy_statistics_cuda(Tensor logits, Tensor targets, Tensor corrupted, float softcap, Tensor(a!) top, "
      "Tensor(b!) total, Tensor(c!) target_logit) -> ()");
  m.def(
      "cross_entropy_gradients_cuda(Tensor logits, Tensor targets, Tensor corrupted, float softcap, Tensor top, "
      "Tensor probability_scale, Tensor target_scale, Tensor(a!) grad) -> ()");
  // Of logits [C, V], scale, probability_scale and nll [C] fp32: nll and, with gradient, the gradient of the loss in the
  // place of the logits. Rows from `live`, an int64 scalar, on have nll 0 and, with clear, the gradient 0.
  m.def(
      "cross_entropy_rows_cuda(Tensor(a!) logits, Tensor targets, Tensor scale, Tensor? probability_scale, Tensor? live, "
      "float softcap, bool gradient, bool clear, Tensor(b!) nll) -> ()");
  // attention.cu. q and out [B, Lq, Hq, E], k and v [rows, Lk, Hkv, E], key_mask [B, Lk], cache_rows [B] int64; block_length 0:
  // none.
  m.def(
      "decode_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cache_rows, int block_length, "
      "float scale, Tensor(a!) out) -> ()");
  // masked_cross_entropy.cpp. x [M, D] fp32 and rows [M] int64, the places of x in targets [N] and the numbers [N] fp32;
  // weight [V, D]; softcap 0: none. The gradients are fp32; those of weight and bias are added to what is there, or (add
  // false) that of weight replaces it.
  m.def(
      "linear_cross_entropy_statistics_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, "
      "float softcap, Tensor(a!) top, Tensor(b!) total, Tensor(c!) target_logit) -> ()");
  m.def(
      "linear_cross_entropy_gradients_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, "
      "float softcap, Tensor top, Tensor probability_scale, Tensor target_scale, Tensor(a!)? grad_x, "
      "Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, bool add) -> ()");
}
