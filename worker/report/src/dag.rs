//! The layout of a DAG in layers from left to right, and nothing about how it looks.
//!
//! Sugiyama's steps: each node goes one layer after the last one that it waits for; an edge over
//! several layers gets a bend in each between; sweeps order every layer by the means of its
//! neighbours, so that few edges cross; then every node moves as near to its neighbours as those
//! above and below leave it room.

use std::collections::BTreeMap;

/// Width of a node.
pub const NODE_WIDTH: f64 = 138.0;
/// Height of a node.
pub const NODE_HEIGHT: f64 = 56.0;
const GAP_X: f64 = 44.0;
const GAP_Y: f64 = 18.0;
/// Height that a bend keeps free around itself.
const BEND_HEIGHT: f64 = 12.0;
const MARGIN: f64 = 4.0;
const SWEEPS: usize = 12;

/// A laid-out DAG.
#[derive(Debug, Default)]
pub struct Layout {
    /// Width of the whole.
    pub width: f64,
    /// Height of the whole.
    pub height: f64,
    /// The upper left corner of each node, in the order in which they came.
    pub nodes: Vec<(f64, f64)>,
    /// The edges.
    pub edges: Vec<Edge>,
}

/// An edge.
#[derive(Debug)]
pub struct Edge {
    /// The node it comes from.
    pub from: usize,
    /// The node it leads to.
    pub to: usize,
    /// Start, bends and end, from left to right.
    pub points: Vec<(f64, f64)>,
    /// Whether a longer way leads there as well: then it says little of the order.
    pub implied: bool,
}

/// A place in a layer: a node, or a bend of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Node(usize),
    Bend(usize, usize),
}

/// Lays out nodes, given for each the nodes before it. Numbers that are no nodes, and edges that
/// would close a cycle, are left out.
pub fn layout(before: &[Vec<usize>]) -> Layout {
    let before = acyclic(before);
    if before.is_empty() {
        return Layout::default();
    }
    let layer = layers(&before);
    let implied = implied(&before, &layer);
    let edges: Vec<(usize, usize)> = (0..before.len())
        .flat_map(|to| before[to].iter().map(move |from| (*from, to)))
        .collect();
    let (mut rows, links) = place(&layer, &edges);
    order(&mut rows, &links);
    let y = settle(&rows, &links);
    draw(&layer, &edges, &implied, &y)
}

/// Each node after all that it waits for, by the order in which nodes become free.
fn acyclic(before: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let nodes = before.len();
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); nodes];
    let mut waits = vec![0usize; nodes];
    let mut clean: Vec<Vec<usize>> = Vec::with_capacity(nodes);
    for (to, froms) in before.iter().enumerate() {
        let mut froms: Vec<usize> = froms
            .iter()
            .copied()
            .filter(|from| *from < nodes && *from != to)
            .collect();
        froms.sort_unstable();
        froms.dedup();
        for from in &froms {
            after[*from].push(to);
        }
        waits[to] = froms.len();
        clean.push(froms);
    }
    let mut rank = vec![usize::MAX; nodes];
    let mut free: Vec<usize> = (0..nodes).filter(|node| waits[*node] == 0).collect();
    let mut next = 0;
    while next < free.len() {
        let node = free[next];
        rank[node] = next;
        next += 1;
        for to in &after[node] {
            waits[*to] -= 1;
            if waits[*to] == 0 {
                free.push(*to);
            }
        }
    }
    for (to, froms) in clean.iter_mut().enumerate() {
        froms.retain(|from| rank[*from] != usize::MAX && rank[to] != usize::MAX);
    }
    clean
}

/// The longest way to each node.
fn layers(before: &[Vec<usize>]) -> Vec<usize> {
    let mut layer = vec![0usize; before.len()];
    // As many rounds as there are layers; there are no cycles.
    loop {
        let mut changed = false;
        for (to, froms) in before.iter().enumerate() {
            let at = froms.iter().map(|from| layer[*from] + 1).max().unwrap_or(0);
            if at > layer[to] {
                layer[to] = at;
                changed = true;
            }
        }
        if !changed {
            return layer;
        }
    }
}

/// The edges beside which a longer way leads from one end to the other.
fn implied(before: &[Vec<usize>], layer: &[usize]) -> BTreeMap<(usize, usize), bool> {
    let mut nodes: Vec<usize> = (0..before.len()).collect();
    nodes.sort_by_key(|node| layer[*node]);
    let mut ancestors: Vec<Vec<bool>> = vec![vec![false; before.len()]; before.len()];
    for node in nodes {
        let mut all = vec![false; before.len()];
        for from in &before[node] {
            all[*from] = true;
            for (known, reached) in all.iter_mut().zip(&ancestors[*from]) {
                *known |= *reached;
            }
        }
        ancestors[node] = all;
    }
    let mut out = BTreeMap::new();
    for (to, froms) in before.iter().enumerate() {
        for from in froms {
            let longer = froms.iter().any(|other| ancestors[*other][*from]);
            out.insert((*from, to), longer);
        }
    }
    out
}

/// What links an item to the layer before it.
type Links = BTreeMap<Item, Vec<Item>>;

/// The layers with nodes and bends, and what links each item with the one before it.
fn place(layer: &[usize], edges: &[(usize, usize)]) -> (Vec<Vec<Item>>, Links) {
    let count = layer.iter().max().map_or(0, |last| last + 1);
    let mut rows: Vec<Vec<Item>> = vec![Vec::new(); count];
    for (node, at) in layer.iter().enumerate() {
        rows[*at].push(Item::Node(node));
    }
    let mut links = Links::new();
    for (number, (from, to)) in edges.iter().enumerate() {
        let mut last = Item::Node(*from);
        for (at, row) in rows
            .iter_mut()
            .enumerate()
            .take(layer[*to])
            .skip(layer[*from] + 1)
        {
            let bend = Item::Bend(number, at);
            row.push(bend);
            links.entry(bend).or_default().push(last);
            last = bend;
        }
        links.entry(Item::Node(*to)).or_default().push(last);
    }
    (rows, links)
}

fn reversed(links: &Links) -> Links {
    let mut out = Links::new();
    for (to, froms) in links {
        for from in froms {
            out.entry(*from).or_default().push(*to);
        }
    }
    out
}

/// Sweeps to and fro, and keeps the order with the fewest crossings.
fn order(rows: &mut Vec<Vec<Item>>, links: &Links) {
    let back = reversed(links);
    let mut best = (crossings(rows, links), rows.clone());
    for sweep in 0..SWEEPS {
        if best.0 == 0 {
            break;
        }
        let forward = sweep % 2 == 0;
        let count = rows.len();
        for step in 1..count {
            let (at, beside, links) = if forward {
                (step, step - 1, links)
            } else {
                (count - 1 - step, count - step, &back)
            };
            let place: BTreeMap<Item, usize> = rows[beside]
                .iter()
                .enumerate()
                .map(|(i, item)| (*item, i))
                .collect();
            let mean = |item: &Item, own: usize| {
                let near: Vec<usize> = links
                    .get(item)
                    .into_iter()
                    .flatten()
                    .filter_map(|n| place.get(n).copied())
                    .collect();
                if near.is_empty() {
                    own as f64
                } else {
                    near.iter().sum::<usize>() as f64 / near.len() as f64
                }
            };
            let mut keyed: Vec<(f64, Item)> = rows[at]
                .iter()
                .enumerate()
                .map(|(i, item)| (mean(item, i), *item))
                .collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            rows[at] = keyed.into_iter().map(|(_, item)| item).collect();
        }
        let crossed = crossings(rows, links);
        if crossed < best.0 {
            best = (crossed, rows.clone());
        }
    }
    *rows = best.1;
}

fn crossings(rows: &[Vec<Item>], links: &Links) -> usize {
    let mut crossed = 0;
    for pair in rows.windows(2) {
        let place: BTreeMap<Item, usize> = pair[0]
            .iter()
            .enumerate()
            .map(|(i, item)| (*item, i))
            .collect();
        let mut lines: Vec<(usize, usize)> = Vec::new();
        for (to, item) in pair[1].iter().enumerate() {
            let froms = links.get(item).into_iter().flatten();
            lines.extend(froms.filter_map(|from| Some((*place.get(from)?, to))));
        }
        for (i, a) in lines.iter().enumerate() {
            crossed += lines[i + 1..]
                .iter()
                .filter(|b| (a.0 < b.0) != (a.1 < b.1) && a.0 != b.0 && a.1 != b.1)
                .count();
        }
    }
    crossed
}

const fn height(item: Item) -> f64 {
    match item {
        Item::Node(_) => NODE_HEIGHT,
        Item::Bend(..) => BEND_HEIGHT,
    }
}

/// The middle of each item, from 0 on.
fn settle(rows: &[Vec<Item>], links: &Links) -> BTreeMap<Item, f64> {
    let back = reversed(links);
    let mut y: BTreeMap<Item, f64> = BTreeMap::new();
    for row in rows {
        let wanted = vec![0.0; row.len()];
        y.extend(row.iter().copied().zip(fit(row, &wanted)));
    }
    for sweep in 0..SWEEPS {
        let forward = sweep % 2 == 0;
        for step in 0..rows.len() {
            let row = &rows[if forward { step } else { rows.len() - 1 - step }];
            let links = if forward { links } else { &back };
            let wanted: Vec<f64> = row
                .iter()
                .map(|item| {
                    let near: Vec<f64> = links
                        .get(item)
                        .into_iter()
                        .flatten()
                        .map(|n| y[n])
                        .collect();
                    if near.is_empty() {
                        y[item]
                    } else {
                        near.iter().sum::<f64>() / near.len() as f64
                    }
                })
                .collect();
            y.extend(row.iter().copied().zip(fit(row, &wanted)));
        }
    }
    let top = y
        .iter()
        .map(|(item, y)| y - height(*item) / 2.0)
        .fold(f64::INFINITY, f64::min);
    for value in y.values_mut() {
        *value -= top;
    }
    y
}

/// The places nearest to the wanted ones (by the sum of squares) that keep the order and the gaps:
/// isotonic regression by pooling adjacent violators, on the places less the room before each.
fn fit(row: &[Item], wanted: &[f64]) -> Vec<f64> {
    let mut room = 0.0;
    let mut rooms = Vec::with_capacity(row.len());
    // (sum, count) of each pool.
    let mut pools: Vec<(f64, usize)> = Vec::new();
    for (i, item) in row.iter().enumerate() {
        if i > 0 {
            room += f64::midpoint(height(row[i - 1]), height(*item)) + GAP_Y;
        }
        rooms.push(room);
        let mut pool = (wanted[i] - room, 1);
        while let Some(last) = pools.last().copied() {
            if last.0 / last.1 as f64 <= pool.0 / pool.1 as f64 {
                break;
            }
            pool = (last.0 + pool.0, last.1 + pool.1);
            pools.pop();
        }
        pools.push(pool);
    }
    let means = pools
        .iter()
        .flat_map(|(sum, count)| std::iter::repeat_n(sum / *count as f64, *count));
    means.zip(rooms).map(|(mean, room)| mean + room).collect()
}

fn draw(
    layer: &[usize],
    edges: &[(usize, usize)],
    implied: &BTreeMap<(usize, usize), bool>,
    y: &BTreeMap<Item, f64>,
) -> Layout {
    let x = |layer: usize| MARGIN + layer as f64 * (NODE_WIDTH + GAP_X);
    let middle = |item: Item| MARGIN + y.get(&item).copied().unwrap_or(0.0);
    let nodes: Vec<(f64, f64)> = (0..layer.len())
        .map(|node| (x(layer[node]), middle(Item::Node(node)) - NODE_HEIGHT / 2.0))
        .collect();
    let lines = edges.iter().enumerate().map(|(number, (from, to))| {
        let mut points = vec![(x(layer[*from]) + NODE_WIDTH, middle(Item::Node(*from)))];
        for at in layer[*from] + 1..layer[*to] {
            // Straight past the nodes of the layer.
            let y = middle(Item::Bend(number, at));
            points.extend([(x(at), y), (x(at) + NODE_WIDTH, y)]);
        }
        points.push((x(layer[*to]), middle(Item::Node(*to))));
        Edge {
            from: *from,
            to: *to,
            points,
            implied: implied.get(&(*from, *to)).copied().unwrap_or(false),
        }
    });
    let last = layer.iter().copied().max().unwrap_or(0);
    let bottom = y
        .iter()
        .map(|(item, y)| y + height(*item) / 2.0)
        .fold(0.0, f64::max);
    Layout {
        width: x(last) + NODE_WIDTH + MARGIN,
        height: bottom + 2.0 * MARGIN,
        nodes,
        edges: lines.collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(layout: &Layout) {
        for (i, a) in layout.nodes.iter().enumerate() {
            assert!(a.0 >= 0.0 && a.0 + NODE_WIDTH <= layout.width);
            assert!(
                a.1 >= 0.0 && a.1 + NODE_HEIGHT <= layout.height,
                "{layout:?}"
            );
            for b in &layout.nodes[i + 1..] {
                let apart = (a.0 - b.0).abs() >= NODE_WIDTH || (a.1 - b.1).abs() >= NODE_HEIGHT;
                assert!(apart, "boxes overlap: {a:?} {b:?}");
            }
        }
        for edge in &layout.edges {
            assert!(edge.points.windows(2).all(|w| w[0].0 < w[1].0), "{edge:?}");
            for (x, y) in &edge.points[1..edge.points.len() - 1] {
                for node in &layout.nodes {
                    let inside = *x > node.0 && *x < node.0 + NODE_WIDTH;
                    let level = *y > node.1 && *y < node.1 + NODE_HEIGHT;
                    assert!(!(inside && level), "an edge runs through a box");
                }
            }
        }
    }

    #[test]
    fn a_chain_is_a_straight_line() {
        let layout = layout(&[vec![], vec![0], vec![1]]);
        check(&layout);
        assert!(layout.nodes.iter().all(|node| node.1 == layout.nodes[0].1));
        assert!(layout.nodes[0].0 < layout.nodes[1].0 && layout.nodes[1].0 < layout.nodes[2].0);
    }

    #[test]
    fn an_edge_beside_a_longer_way_goes_around_and_is_marked() {
        let layout = layout(&[vec![], vec![0], vec![0, 1]]);
        check(&layout);
        let marked: Vec<(usize, usize)> = layout
            .edges
            .iter()
            .filter(|e| e.implied)
            .map(|e| (e.from, e.to))
            .collect();
        assert_eq!(marked, [(0, 2)]);
        assert!(layout.edges.iter().any(|edge| edge.points.len() == 4));
    }

    #[test]
    fn crossings_are_avoided_where_they_can_be() {
        // 0 → 3, 1 → 2: in the order given the two lines would cross.
        let layout = layout(&[vec![], vec![], vec![1], vec![0]]);
        check(&layout);
        let above = |a: usize, b: usize| layout.nodes[a].1 < layout.nodes[b].1;
        assert_eq!(above(0, 1), above(3, 2));
    }

    #[test]
    fn nonsense_is_left_out() {
        let layout = layout(&[vec![0, 7], vec![2], vec![1]]);
        check(&layout);
        assert_eq!(layout.nodes.len(), 3);
        assert!(layout.edges.is_empty());
        assert!(super::layout(&[]).nodes.is_empty());
    }

    proptest! {
        #[test]
        fn any_dag_is_drawn_from_left_to_right_without_overlaps(
            lists in proptest::collection::vec(proptest::collection::vec(0usize..40, 0..5), 1..40)
        ) {
            let before: Vec<Vec<usize>> = lists
                .into_iter()
                .enumerate()
                .map(|(to, froms)| froms.into_iter().filter(|from| *from < to).collect())
                .collect();
            check(&layout(&before));
        }
    }
}
