//! BERT and its kin computed: embeddings, blocks of attention and feed-forward layers, each followed by a norm, and a head.
//!
//! Padding has no influence on other tokens: what a mask leaves out gets the lowest score there is before the softmax.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::sequential::{embed, linear};
use super::tensors::Tensors;
use super::{ops, product};
use crate::backend::LoadError;
use crate::backend::safetensors::encoder::{Encoder, Family, Head, Pooling};
use crate::backend::safetensors::layers::Activation;

/// What a mean divides by at least, and what a norm does, as sentence-transformers has them.
const LEAST_TOKENS: f64 = 1e-9;
const LEAST_LENGTH: f32 = 1e-12;
/// What stands in a masked token's place where the greatest is looked for.
const MASKED: f32 = -1e9;

/// What the tokens of a batch are: each [rows × tokens], row by row.
pub struct Tokens {
    pub rows: usize,
    pub length: usize,
    /// Below the vocabulary's size.
    pub ids: Vec<u32>,
    /// 1 for tokens, 0 for padding.
    pub mask: Vec<u32>,
    /// Below the number of types; all 0 where it is `None`.
    pub types: Option<Vec<u32>>,
}

impl Tokens {
    pub fn slice(&self, rows: Range<usize>) -> Tokens {
        let part = |values: &[u32]| values[rows.start * self.length..rows.end * self.length].to_vec();
        Tokens {
            rows: rows.len(),
            length: self.length,
            ids: part(&self.ids),
            mask: part(&self.mask),
            types: self.types.as_deref().map(part),
        }
    }
}

/// The weights, immutable.
pub struct EncoderNetwork {
    encoder: Encoder,
    words: Tensor,
    positions: Tensor,
    types: Option<Tensor>,
    norm: Norm,
    blocks: Vec<Block>,
    classifier: Option<(Dense, Dense)>,
}

struct Dense {
    weight: Tensor,
    bias: Tensor,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

struct Block {
    query: Dense,
    key: Dense,
    value: Dense,
    attended: Dense,
    attention_norm: Norm,
    intermediate: Dense,
    output: Dense,
    output_norm: Norm,
}

impl Dense {
    fn load(name: &str, tensors: &Tensors) -> std::result::Result<Dense, LoadError> {
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        Ok(Dense { weight: tensors.transposed(&weight)?, bias: tensors.tensor(&bias)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
    }
}

impl Norm {
    fn load(name: &str, eps: f64, tensors: &Tensors) -> std::result::Result<Norm, LoadError> {
        let part = |part: &str| tensors.tensor(&format!("{name}.{part}"));
        Ok(Norm { weight: part("weight")?, bias: part("bias")?, eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, self.weight.elem_count(), Some(&self.weight), Some(&self.bias), self.eps)
    }
}

impl Block {
    fn load(encoder: &Encoder, number: usize, tensors: &Tensors) -> std::result::Result<Block, LoadError> {
        let names = encoder.block(number);
        let dense = |name: &str| Dense::load(name, tensors);
        let norm = |name: &str| Norm::load(name, encoder.eps, tensors);
        Ok(Block {
            query: dense(&names.query)?,
            key: dense(&names.key)?,
            value: dense(&names.value)?,
            attended: dense(&names.attended)?,
            attention_norm: norm(&names.attention_norm)?,
            intermediate: dense(&names.intermediate)?,
            output: dense(&names.output)?,
            output_norm: norm(&names.output_norm)?,
        })
    }

    /// `x` [rows, tokens, hidden]; `bias`, where anything is masked, [rows, 1, 1, tokens].
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>, heads: usize, activation: Activation) -> Result<Tensor> {
        let (rows, tokens, hidden) = x.dims3()?;
        let split = |dense: &Dense| {
            dense.forward(x)?.reshape((rows, tokens, heads, hidden / heads))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let scale = 1.0 / ((hidden / heads) as f64).sqrt();
        let scores = (product::product_transposed(&query, &key)? * scale)?;
        let scores = match bias {
            Some(bias) => scores.broadcast_add(bias)?,
            None => scores,
        };
        let attended = product::product(&ops::softmax_last(&scores, false)?, &value)?;
        let attended = attended.transpose(1, 2)?.contiguous()?.reshape((rows, tokens, hidden))?;
        let x = self.attention_norm.forward(&(self.attended.forward(&attended)? + x)?)?;
        let wide = ops::activate(&self.intermediate.forward(&x)?, activation)?;
        self.output_norm.forward(&(self.output.forward(&wide)? + x)?)
    }
}

impl EncoderNetwork {
    /// The weights are known to be there in their shapes.
    pub fn load(encoder: &Encoder, tensors: &Tensors) -> std::result::Result<EncoderNetwork, LoadError> {
        let table = |name: &str| tensors.tensor(&encoder.embeddings(&format!("{name}_embeddings.weight")));
        let classifier = match encoder.head {
            Head::Classes { .. } => {
                let (dense, out) = encoder.classifier();
                Some((Dense::load(&dense, tensors)?, Dense::load(&out, tensors)?))
            }
            Head::Hidden | Head::Embedding { .. } => None,
        };
        Ok(EncoderNetwork {
            words: table("word")?,
            positions: table("position")?,
            types: (encoder.token_types > 0).then(|| table("token_type")).transpose()?,
            norm: Norm::load(&encoder.embeddings("LayerNorm"), encoder.eps, tensors)?,
            blocks: (0..encoder.layers)
                .map(|n| Block::load(encoder, n, tensors))
                .collect::<std::result::Result<_, _>>()?,
            classifier,
            encoder: encoder.clone(),
        })
    }

    /// One tensor per output of the signature.
    pub fn forward(&self, tokens: &Tokens) -> Result<Vec<Tensor>> {
        let shape = (tokens.rows, tokens.length);
        let device = self.words.device();
        let mask = Tensor::from_slice(&tokens.mask, shape, device)?;
        let bias = if tokens.mask.contains(&0) { Some(scores_of(&tokens.mask, shape, device)?) } else { None };
        let mut x = self.embed(tokens)?;
        for block in &self.blocks {
            x = block.forward(&x, bias.as_ref(), self.encoder.heads, self.encoder.activation)?;
        }
        match self.encoder.head {
            Head::Hidden => Ok(vec![x]),
            Head::Embedding { pooling, normalize } => {
                let pooled = pool(&x, &mask, pooling)?;
                let pooled = if normalize { ops::normalize(&pooled, LEAST_LENGTH)? } else { pooled };
                Ok(vec![x, pooled])
            }
            Head::Classes { .. } => Ok(vec![self.classify(&x)?]),
        }
    }

    fn embed(&self, tokens: &Tokens) -> Result<Tensor> {
        let shape = (tokens.rows, tokens.length);
        let indices = |values: &[u32]| Tensor::from_slice(values, shape, self.words.device());
        let words = embed(&self.words, &indices(&tokens.ids)?)?;
        let positions = embed(&self.positions, &indices(&positions(&self.encoder, tokens))?)?;
        let mut sum = words;
        if let Some(types) = &self.types {
            sum = match &tokens.types {
                Some(ids) => (sum + embed(types, &indices(ids)?)?)?,
                None => sum.broadcast_add(&types.narrow(0, 0, 1)?)?,
            };
        }
        self.norm.forward(&(sum + positions)?)
    }

    /// Logits of the first token's hidden state.
    fn classify(&self, x: &Tensor) -> Result<Tensor> {
        let first = x.narrow(1, 0, 1)?.squeeze(1)?;
        let Some((dense, out)) = &self.classifier else { candle_core::bail!("an encoder without a head") };
        let activation = match self.encoder.family {
            Family::DistilBert => Activation::Relu,
            Family::Bert | Family::Roberta => Activation::Tanh,
        };
        out.forward(&ops::activate(&dense.forward(&first)?, activation)?)
    }
}

/// Counted from 0; by RoBERTa from behind the padding's own number, over what is not padding by its id.
pub fn positions(encoder: &Encoder, tokens: &Tokens) -> Vec<u32> {
    let (length, padding) = (tokens.length, encoder.padding as u32);
    let rows = tokens.ids.chunks(length.max(1));
    match encoder.family {
        Family::Bert | Family::DistilBert => rows.flat_map(|row| 0..row.len() as u32).collect(),
        Family::Roberta => rows
            .flat_map(|row| {
                let mut last = padding;
                row.iter().map(move |id| {
                    if *id == padding {
                        return padding;
                    }
                    last += 1;
                    last
                })
            })
            .collect(),
    }
}

/// What is added to the scores: nothing for tokens, the lowest number for padding.
fn scores_of(mask: &[u32], (rows, length): (usize, usize), device: &Device) -> Result<Tensor> {
    let scores: Vec<f32> = mask.iter().map(|kept| if *kept == 0 { f32::MIN } else { 0.0 }).collect();
    Tensor::from_vec(scores, (rows, 1, 1, length), device)
}

/// `x` [rows, tokens, hidden] and `mask` [rows, tokens] to [rows, hidden].
fn pool(x: &Tensor, mask: &Tensor, pooling: Pooling) -> Result<Tensor> {
    match pooling {
        Pooling::Cls => x.narrow(1, 0, 1)?.squeeze(1)?.contiguous(),
        Pooling::Mean => {
            let kept = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
            let count = kept.sum(1)?.maximum(LEAST_TOKENS)?;
            x.broadcast_mul(&kept)?.sum(1)?.broadcast_div(&count)
        }
        Pooling::Max => {
            let masked = Tensor::full(MASKED, x.shape(), x.device())?;
            mask.unsqueeze(2)?.broadcast_as(x.shape())?.where_cond(x, &masked)?.max(1)
        }
    }
}
