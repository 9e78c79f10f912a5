//! IDX, the format of MNIST: images of bytes in one file, their labels in another.
//!
//! A file is a magic number (two zero bytes, the type 8 for unsigned bytes, the number of
//! dimensions), each dimension as a big-endian `u32`, then the values. The header is checked against
//! the number of bytes that really follow. Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database".

use std::io::{BufReader, Read};

use emberline_common::spec::kinds::convert::ReadSpec;
use emberline_worker::stage::{StageContext, StageError};

use super::{Emit, SourceFile, bytes, check_types};
use crate::{
    scalar::push_cast,
    schema::{BatchBuilder, ColumnDef, ColumnType, Schema, Value},
};

/// The largest image, in bytes.
const MAX_IMAGE_BYTES: usize = 4 << 20;

/// IDX files: images, each with or without a file of labels.
pub struct IdxSource {
    /// Images and labels, paired in the order of their names.
    pairs: Vec<(SourceFile, Option<SourceFile>)>,
    schema: Schema,
}

impl IdxSource {
    pub(super) fn open(
        files: Vec<SourceFile>,
        spec: &ReadSpec,
        _ctx: &StageContext,
    ) -> Result<Self, StageError> {
        let (labels, images): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| {
            let name = file.path.file_name().and_then(|n| n.to_str());
            spec.labels
                .as_deref()
                .zip(name)
                .is_some_and(|(pattern, name)| matches(pattern, name))
        });
        if let Some(pattern) = &spec.labels
            && labels.len() != images.len()
        {
            return Err(StageError::data(format!(
                "`labels: {pattern}` names {} of the IDX files and leaves {}: there is to be one file of labels for each of images",
                labels.len(),
                images.len()
            )));
        }
        let mut labels = labels.into_iter();
        let pairs: Vec<_> = images
            .into_iter()
            .map(|image| (image, labels.next()))
            .collect();
        let mut size: Option<Vec<usize>> = None;
        for (images, labels) in &pairs {
            let header = Reader::open(images)?;
            if header.dimensions.len() < 3 {
                return Err(header.error(
                    "has no images (two dimensions or fewer): name the file of labels with `labels: \"*labels*\"`",
                ));
            }
            match &size {
                None => size = Some(header.dimensions[1..].to_vec()),
                Some(first) if *first == header.dimensions[1..] => {}
                Some(_) => {
                    return Err(header.error("has images of another size than the first file"));
                }
            }
            if let Some(labels) = labels {
                let own = Reader::open(labels)?;
                if own.dimensions.len() != 1 {
                    return Err(own.error("is to hold labels, but has more than one dimension"));
                }
                if own.count() != header.count() {
                    return Err(own.error(&format!(
                        "has {} labels for the {} images of `{}`",
                        own.count(),
                        header.count(),
                        images.label
                    )));
                }
            }
        }
        let given = |name: &str, default| spec.types.get(name).copied().unwrap_or(default);
        let mut columns = vec![ColumnDef {
            name: "image".to_owned(),
            column_type: ColumnType::Bytes,
        }];
        if spec.labels.is_some() {
            columns.push(ColumnDef {
                name: "label".to_owned(),
                column_type: given("label", ColumnType::Integer),
            });
        }
        let names: Vec<String> = columns.iter().map(|c| c.name.clone()).collect();
        if let Some((images, _)) = pairs.first() {
            check_types(spec, &names, &images.label)?;
        }
        if given("image", ColumnType::Bytes) != ColumnType::Bytes {
            return Err(StageError::user(
                "the column `image` of IDX files is of type bytes",
            ));
        }
        Ok(Self {
            pairs,
            schema: Schema { columns },
        })
    }

    pub(super) const fn schema(&self) -> &Schema {
        &self.schema
    }

    pub(super) fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        let mut builder = BatchBuilder::new(&self.schema);
        let take = |builder: &mut BatchBuilder| {
            builder
                .take()
                .map_err(|e| StageError::system(format!("cannot build a batch: {e}")))
        };
        for (images, labels) in &self.pairs {
            let mut images = Reader::open(images)?;
            let mut labels = labels.as_ref().map(Reader::open).transpose()?;
            let mut image = vec![0; images.item_bytes()];
            let mut label = [0];
            for _ in 0..images.count() {
                images.item(&mut image)?;
                builder.push(0, Value::Bytes(&image));
                if let Some(labels) = &mut labels {
                    labels.item(&mut label)?;
                    let value = Value::Integer(i64::from(label[0]));
                    push_cast(&mut builder, 1, self.schema.columns[1].column_type, value)
                        .map_err(|e| labels.error(&format!("column `label`: {e}")))?;
                }
                if builder.end_row() {
                    ctx.check_cancelled()?;
                    emit(take(&mut builder)?)?;
                }
            }
            images.end()?;
            if let Some(mut labels) = labels {
                labels.end()?;
            }
        }
        emit(take(&mut builder)?)
    }
}

struct Reader<'a> {
    file: &'a SourceFile,
    dimensions: Vec<usize>,
    done: usize,
    inner: BufReader<Box<dyn Read>>,
}

impl<'a> Reader<'a> {
    fn open(file: &'a SourceFile) -> Result<Self, StageError> {
        let (inner, compressed) = bytes::open(file)?;
        let mut out = Self {
            file,
            dimensions: Vec::new(),
            done: 0,
            inner: BufReader::with_capacity(64 << 10, inner),
        };
        let mut word = [0; 4];
        out.header(&mut word)?;
        let [0, 0, 8, dimensions @ 1..=4] = word else {
            return Err(out.error(&format!(
                "does not begin like an IDX file of unsigned bytes (00 00 08 and 1 to 4 dimensions), but with {word:02x?}"
            )));
        };
        let mut total: u64 = 1;
        for _ in 0..dimensions {
            out.header(&mut word)?;
            let dimension = u32::from_be_bytes(word);
            total = total.saturating_mul(u64::from(dimension));
            out.dimensions.push(dimension as usize);
        }
        if out.dimensions[1..].contains(&0) {
            return Err(out.error("has images without pixels"));
        }
        let item = out.dimensions[1..]
            .iter()
            .try_fold(1usize, |product, d| product.checked_mul(*d));
        if item.is_none_or(|item| item > MAX_IMAGE_BYTES) {
            return Err(out.error(&format!(
                "has images of {:?} pixels, more than {MAX_IMAGE_BYTES} bytes",
                &out.dimensions[1..]
            )));
        }
        if !compressed {
            let length = std::fs::metadata(&file.path)
                .map_err(|e| StageError::io("read", &file.path, e))?
                .len();
            let header = 4 + 4 * u64::from(dimensions);
            if length - header != total {
                return Err(out.error(&format!(
                    "its header says {:?}, that is {total} bytes, but {} follow",
                    out.dimensions,
                    length - header
                )));
            }
        }
        Ok(out)
    }

    fn header(&mut self, word: &mut [u8; 4]) -> Result<(), StageError> {
        self.inner.read_exact(word).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.error("ends within the header"),
            _ => bytes::failed(self.file, e),
        })
    }

    fn count(&self) -> usize {
        self.dimensions[0]
    }

    fn item_bytes(&self) -> usize {
        self.dimensions[1..].iter().product()
    }

    fn item(&mut self, out: &mut [u8]) -> Result<(), StageError> {
        self.inner.read_exact(out).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => self.error(&format!(
                "its header says {} items, but it ends within number {}",
                self.count(),
                self.done + 1
            )),
            _ => bytes::failed(self.file, e),
        })?;
        self.done += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), StageError> {
        let mut more = [0];
        match self.inner.read(&mut more) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.error(&format!(
                "has more bytes than the {} items of its header",
                self.count()
            ))),
            Err(e) => Err(bytes::failed(self.file, e)),
        }
    }

    fn error(&self, what: &str) -> StageError {
        StageError::data(format!("`{}` {what}", self.file.label))
    }
}

/// Whether a name fits a pattern in which `*` stands for any characters and `?` for one.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            n = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_pattern_has_stars_and_question_marks() {
        assert!(matches("*labels*", "train-labels-idx1-ubyte.gz"));
        assert!(matches("t?0k-*", "t10k-images"));
        assert!(!matches("*labels*", "train-images-idx3-ubyte.gz"));
        assert!(!matches("labels", "labels.gz"));
    }
}
