import { DatabaseSync } from 'node:sqlite'
import type { CheckpointKind, CheckpointMark } from '../../core/record/index.ts'

/** damaged: a part of a journal or of a mirror that it needs is damaged. */
export type CheckpointState = 'pending' | 'valid' | 'proved' | 'suspect' | 'damaged'

/** A checkpoint of a VPG. `namedSeqs`: per VM id the sequence up to which its journal is replayed. */
export type CatalogueEntry = { id: string; atUnixMs: number; kind: CheckpointKind; tag?: string; state: CheckpointState; vms: string[]; namedSeqs: Record<string, number> }

/** The newest checkpoint that in the journal of `vm` does not come behind `seq` is to be kept by this name, as soon as it is certain that something `changed`. */
export type BeforeSync = { vm: string; seq: number; tag: string; changed: boolean }

export type VpgEntry = { siteId: string; name: string; vms: string[] }

const SCHEMA = `
  PRAGMA journal_mode = WAL;
  PRAGMA synchronous = NORMAL;
  CREATE TABLE IF NOT EXISTS vpg (site TEXT, name TEXT, vms TEXT, PRIMARY KEY (site, name)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS checkpoint (site TEXT, vpg TEXT, id TEXT, at INTEGER, kind TEXT, tag TEXT, vms TEXT, missing INTEGER,
    PRIMARY KEY (site, vpg, at, id)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS mark (site TEXT, vm TEXT, id TEXT, epoch INTEGER, named INTEGER, judged INTEGER DEFAULT 0, PRIMARY KEY (site, vm, id)) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS mark_unjudged ON mark (site, vm, epoch, named) WHERE judged = 0;
  CREATE INDEX IF NOT EXISTS mark_by_seq ON mark (site, vm, named);
  CREATE INDEX IF NOT EXISTS checkpoint_pending ON checkpoint (site, vpg, at) WHERE missing > 0;
  CREATE INDEX IF NOT EXISTS checkpoint_by_id ON checkpoint (site, id);
  CREATE TABLE IF NOT EXISTS damage (site TEXT, vm TEXT, from_seq INTEGER, to_seq INTEGER, PRIMARY KEY (site, vm, from_seq, to_seq)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS sync (site TEXT, vm TEXT, since_seq INTEGER, PRIMARY KEY (site, vm)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS before_sync (site TEXT, vm TEXT, seq INTEGER, tag TEXT, changed INTEGER DEFAULT 0, ended INTEGER DEFAULT 0, PRIMARY KEY (site, vm, seq)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS seen (site TEXT, vm TEXT, seq INTEGER, PRIMARY KEY (site, vm)) WITHOUT ROWID;
`

const PROVED = 1
const SUSPECT = 2
/** A checkpoint whose markers have not all come this long after a later one became valid never will be. */
const PENDING_MS = 60_000

type Row = Record<string, string | number | null>

/**
 * The list of checkpoints, in SQLite. It is derived: everything in it comes from marks in the journals, and it can be made again from
 * them (`seenSeq` says from where). A checkpoint is valid when the journals of all its VMs hold its marker durably.
 */
export class Catalogue implements Disposable {
  readonly #db: DatabaseSync
  readonly #statements: ReturnType<typeof prepare>

  /** @param path of the database file; ':memory:' for tests */
  constructor(path: string) {
    this.#db = new DatabaseSync(path)
    this.#db.exec(SCHEMA)
    this.#statements = prepare(this.#db)
  }

  /** Runs `work` in one transaction. */
  batch<T>(work: () => T): T {
    this.#db.exec('BEGIN')
    try {
      const result = work()
      this.#db.exec('COMMIT')
      return result
    } catch (error) {
      // A full disk may have ended the transaction already.
      if (this.#db.isTransaction) this.#db.exec('ROLLBACK')
      throw error
    }
  }

  noteVpg(siteId: string, name: string, vms: readonly string[]): void {
    this.#statements.putVpg.run(siteId, name, JSON.stringify(vms))
  }

  listVpgs(): VpgEntry[] {
    return (this.#statements.allVpgs.all() as Row[]).map(({ site, name, vms }) => ({ siteId: String(site), name: String(name), vms: JSON.parse(String(vms)) as string[] }))
  }

  /** Up to which sequence the marks of a journal have been noted. */
  seenSeq(siteId: string, vm: string): number {
    const row = this.#statements.getSeen.get(siteId, vm) as Row | undefined
    return Number(row?.seq ?? 0)
  }

  noteSeen(siteId: string, vm: string, seq: number): void {
    this.#statements.putSeen.run(siteId, vm, seq)
  }

  /** The journal of `vm` holds the marker durably. True if the checkpoint became valid by it. Noting it twice changes nothing. */
  noteMark(siteId: string, vm: string, epoch: number, namedSeq: number, mark: CheckpointMark): boolean {
    const { addMark, addCheckpoint, countDown, dropPending, groupOfMark } = this.#statements
    // A group whose protected site never comes back is known by its journals alone.
    groupOfMark.run({ site: siteId, vpg: mark.vpg, vms: JSON.stringify(mark.vms), at: mark.atUnixMs })
    addCheckpoint.run(siteId, mark.vpg, mark.id, mark.atUnixMs, mark.kind, mark.tag ?? null, JSON.stringify(mark.vms), mark.vms.length)
    if (addMark.run(siteId, vm, mark.id, epoch, namedSeq).changes === 0) return false
    const { missing } = countDown.get(siteId, mark.vpg, mark.atUnixMs, mark.id) as Row
    if (missing !== 0) return false
    dropPending.run(siteId, mark.vpg, mark.atUnixMs - PENDING_MS)
    return !this.#isDamaged(siteId, mark.id)
  }

  /** Checkpoints that stand in these spans of the journal of `vm` need something damaged; what was said of this VM before holds no more. */
  noteDamage(siteId: string, vm: string, spans: readonly { fromSeq: number; toSeq: number }[]): void {
    this.batch(() => {
      this.#statements.dropDamage.run(siteId, vm)
      for (const { fromSeq, toSeq } of spans) this.#statements.addDamage.run(siteId, vm, fromSeq, toSeq)
    })
  }

  /** Where checkpoints stand in the journal of a VM, from `fromSeq` on, in order. */
  namedSeqs(siteId: string, vm: string, fromSeq: number): number[] {
    return (this.#statements.namedFrom.all(siteId, vm, fromSeq) as Row[]).map(({ named }) => Number(named))
  }

  /** The checkpoints that need something damaged of this VM: how many, and the oldest and newest by label. */
  damaged(siteId: string, vm: string): { vpg: string; count: number; oldest: { id: string; atUnixMs: number }; newest: { id: string; atUnixMs: number } } | undefined {
    const rows = this.#statements.damagedOf.all({ site: siteId, vm }) as Row[]
    const [first, last] = [rows.at(0), rows.at(-1)]
    if (first === undefined || last === undefined) return undefined
    const place = (row: Row) => ({ id: String(row.id), atUnixMs: Number(row.at) })
    return { vpg: String(last.vpg), count: rows.length, oldest: place(first), newest: place(last) }
  }

  /** The journal of `vm` holds a sync that has begun and not ended: no checkpoint comes before its end. `before`: see BeforeSync. */
  noteSyncBegin(siteId: string, vm: string, seq: number, before?: string): void {
    this.#statements.addSync.run(siteId, vm, seq)
    // One that was broken off may have changed something.
    this.#statements.doubtBeforeSync.run(siteId, vm)
    // Between the two there is no checkpoint.
    if (before !== undefined) this.#statements.addBeforeSync.run({ site: siteId, vm, seq, tag: before })
  }

  /** @param changed false: it found nothing to copy */
  noteSyncEnd(siteId: string, vm: string, changed = true): void {
    this.#statements.dropSync.run(siteId, vm)
    if (changed) this.#statements.doubtBeforeSync.run(siteId, vm)
    this.#statements.endBeforeSync.run(siteId, vm)
    this.#statements.dropUnchanged.run(siteId, vm)
  }

  /** What is to be kept because of syncs of `vm`, oldest first. */
  beforeSyncs(siteId: string, vm: string): BeforeSync[] {
    return (this.#statements.beforeSyncs.all(siteId, vm) as Row[]).map(({ seq, tag, changed, ended }) => ({ vm, seq: Number(seq), tag: String(tag), changed: changed === 1 && ended === 1 }))
  }

  /** It is kept. */
  forgetBeforeSync(siteId: string, vm: string, seq: number): void {
    this.#statements.dropBeforeSync.run(siteId, vm, seq)
  }

  /** Where the first sync since the last one that ended began. */
  syncSinceSeq(siteId: string, vm: string): number | undefined {
    const row = this.#statements.getSync.get(siteId, vm) as Row | undefined
    return row === undefined ? undefined : Number(row.since_seq)
  }

  /** Names a checkpoint that has no tag yet: it stays in the list until it leaves the history. */
  tag(siteId: string, vpg: string, id: string, tag: string): void {
    this.#statements.setTag.run(tag, siteId, vpg, id)
  }

  /** A comparison of QEMU's counters with the captured bytes, up to `upToSeq` of this epoch. Equal, it proves what came from `fromSeq` on; else all is suspect. */
  noteProof(siteId: string, vm: string, epoch: number, upToSeq: number, ok: boolean, fromSeq = 0): void {
    this.#statements.judge.run(ok ? PROVED : SUSPECT, siteId, vm, epoch, ok ? fromSeq : 0, upToSeq)
  }

  /** The newest checkpoint that is valid or proved, or undefined. Suspect and damaged ones are not offered. */
  latest(siteId: string, vpg: string, options: { taggedOnly?: boolean; notAfterUnixMs?: number } = {}): CatalogueEntry | undefined {
    const rows = this.#statements.validDescending.iterate(siteId, vpg, options.notAfterUnixMs ?? Number.MAX_SAFE_INTEGER)
    for (const row of rows as Iterable<Row>) {
      if (options.taggedOnly === true && row.tag === null) continue
      const entry = this.#entry(siteId, row)
      if (entry.state === 'valid' || entry.state === 'proved') return entry
    }
    return undefined
  }

  find(siteId: string, vpg: string, id: string): CatalogueEntry | undefined {
    const row = this.#statements.byId.get(siteId, vpg, id) as Row | undefined
    return row && this.#entry(siteId, row)
  }

  /** Newest first. */
  list(siteId: string, vpg: string, options: { limit: number; fromUnixMs?: number; toUnixMs?: number }): CatalogueEntry[] {
    const rows = this.#statements.list.all(siteId, vpg, options.fromUnixMs ?? 0, options.toUnixMs ?? Number.MAX_SAFE_INTEGER, options.limit) as Row[]
    return rows.map((row) => this.#entry(siteId, row))
  }

  /** Those that were ever valid, by label from `fromUnixMs` up to before `toUnixMs`, oldest first. */
  ascending(siteId: string, vpg: string, options: { fromUnixMs: number; toUnixMs: number; limit: number }): CatalogueEntry[] {
    const rows = this.#statements.ascending.all(siteId, vpg, options.fromUnixMs, options.toUnixMs, options.limit) as Row[]
    return rows.map((row) => this.#entry(siteId, row))
  }

  /** The oldest checkpoint by label that is valid or proved. */
  oldest(siteId: string, vpg: string): CatalogueEntry | undefined {
    for (const row of this.#statements.validAscending.iterate(siteId, vpg) as Iterable<Row>) {
      const entry = this.#entry(siteId, row)
      if (entry.state === 'valid' || entry.state === 'proved') return entry
    }
    return undefined
  }

  /** The newest checkpoint of the group that is valid or proved, holds `vm`, and in its journal does not come behind `seq`. */
  newestWith(siteId: string, vpg: string, vm: string, seq: number): CatalogueEntry | undefined {
    for (const { id } of this.#statements.marksDescending.iterate(siteId, vm, seq) as Iterable<Row>) {
      const entry = this.#candidate(siteId, vpg, String(id))
      if (entry !== undefined) return entry
    }
    return undefined
  }

  /**
   * The newest checkpoint, in order of sequences, that is valid or proved and in none of the VMs named goes beyond their limits. VMs not
   * named have none.
   */
  newestAtOrBelow(siteId: string, vpg: string, limits: ReadonlyMap<string, number>): CatalogueEntry | undefined {
    for (const [lead, limit] of limits) {
      for (const { id } of this.#statements.marksDescending.iterate(siteId, lead, Math.min(limit, Number.MAX_SAFE_INTEGER)) as Iterable<Row>) {
        const entry = this.#candidate(siteId, vpg, String(id))
        if (entry?.vms.every((vm) => entry.namedSeqs[vm] <= (limits.get(vm) ?? Infinity)) === true) return entry
      }
    }
    return undefined
  }

  /** The oldest checkpoint that is valid or proved and in the journal of `vm` does not come before `seq`. */
  oldestAtOrAbove(siteId: string, vpg: string, vm: string, seq: number): CatalogueEntry | undefined {
    for (const { id } of this.#statements.marksAscending.iterate(siteId, vm, seq) as Iterable<Row>) {
      const entry = this.#candidate(siteId, vpg, String(id))
      if (entry !== undefined) return entry
    }
    return undefined
  }

  /**
   * Forgets checkpoints of which the journal of some VM no longer holds what they need: in it they come before its floor.
   * @returns how many markers were looked at, at most `limit`: call again until it is 0
   */
  dropBelow(siteId: string, floors: ReadonlyMap<string, number>, limit = 500): number {
    return this.batch(() => {
      let done = 0
      for (const [vm, floor] of floors) {
        this.#statements.dropBeforeSyncsBelow.run(siteId, vm, floor)
        for (const { id } of this.#statements.marksBelow.all(siteId, vm, floor, limit - done) as Row[]) {
          for (const row of this.#statements.byIdAnywhere.all(siteId, id) as Row[]) {
            const vms = JSON.parse(String(row.vms)) as string[]
            if (vms.includes(vm)) this.#drop(siteId, String(row.vpg), { id: String(id), atUnixMs: Number(row.at), vms })
          }
          this.#statements.dropMark.run(siteId, vm, id)
          done++
        }
      }
      return done
    })
  }

  /** Forgets these checkpoints. */
  drop(siteId: string, vpg: string, entries: readonly Pick<CatalogueEntry, 'id' | 'atUnixMs' | 'vms'>[]): void {
    this.batch(() => {
      for (const entry of entries) this.#drop(siteId, vpg, entry)
    })
  }

  /** How many checkpoints, of any group, need the journal of `vm`. */
  countWith(siteId: string, vm: string): number {
    return Number((this.#statements.countWith.get(siteId, vm) as Row).count)
  }

  /** The journal of `vm` is gone, and no checkpoint needs it any more (`dropBelow`): one that comes begins anew. */
  forgetVm(siteId: string, vm: string): void {
    this.batch(() => {
      for (const table of ['dropSeen', 'dropSync', 'dropDamage', 'dropBeforeSyncs'] as const) this.#statements[table].run(siteId, vm)
    })
  }

  forgetVpg(siteId: string, name: string): void {
    this.#statements.dropVpg.run(siteId, name)
  }

  count(siteId: string, vpg: string): { valid: number; oldestAtUnixMs?: number } {
    const { valid, oldest } = this.#statements.count.get(siteId, vpg) as Row
    return { valid: Number(valid), ...(oldest === null ? {} : { oldestAtUnixMs: Number(oldest) }) }
  }

  [Symbol.dispose](): void {
    if (this.#db.isOpen) this.#db.close()
  }

  #isDamaged(siteId: string, id: string): boolean {
    return this.#statements.isDamaged.get(siteId, id) !== undefined
  }

  #candidate(siteId: string, vpg: string, id: string): CatalogueEntry | undefined {
    const row = (this.#statements.byIdAnywhere.all(siteId, id) as Row[]).find((one) => one.vpg === vpg)
    const entry = row && this.#entry(siteId, row)
    return entry?.state === 'valid' || entry?.state === 'proved' ? entry : undefined
  }

  #drop(siteId: string, vpg: string, { id, atUnixMs, vms }: Pick<CatalogueEntry, 'id' | 'atUnixMs' | 'vms'>): void {
    for (const vm of vms) this.#statements.dropMark.run(siteId, vm, id)
    this.#statements.dropCheckpoint.run(siteId, vpg, atUnixMs, id)
  }

  #entry(siteId: string, row: Row): CatalogueEntry {
    const vms = JSON.parse(String(row.vms)) as string[]
    const namedSeqs: Record<string, number> = {}
    let proved = 0
    let suspect = false
    for (const vm of vms) {
      const mark = this.#statements.getMark.get(siteId, vm, row.id) as Row | undefined
      if (mark === undefined) continue
      namedSeqs[vm] = Number(mark.named)
      if (mark.judged === PROVED) proved++
      if (mark.judged === SUSPECT) suspect = true
    }
    const state = row.missing !== 0 ? 'pending' : this.#isDamaged(siteId, String(row.id)) ? 'damaged' : suspect ? 'suspect' : proved === vms.length ? 'proved' : 'valid'
    return { id: String(row.id), atUnixMs: Number(row.at), kind: row.kind as CheckpointKind, ...(row.tag === null ? {} : { tag: String(row.tag) }), state, vms, namedSeqs }
  }
}

/** Of a row of mark: nothing damaged is needed there. The table of damage is nearly always empty. */
const NOT_DAMAGED = 'NOT EXISTS (SELECT 1 FROM damage WHERE damage.site = mark.site AND damage.vm = mark.vm AND mark.named >= from_seq AND mark.named < to_seq)'
/** Of a row of checkpoint. */
const WHOLE = `NOT EXISTS (SELECT 1 FROM damage CROSS JOIN mark ON mark.site = damage.site AND mark.vm = damage.vm AND mark.id = checkpoint.id
  WHERE damage.site = checkpoint.site AND mark.named >= from_seq AND mark.named < to_seq)`

// Where an index is named, SQLite would go through all checkpoints of the group instead: it does not know that there are many.
const prepare = (db: DatabaseSync) => ({
  putVpg: db.prepare('INSERT INTO vpg VALUES (?, ?, ?) ON CONFLICT (site, name) DO UPDATE SET vms = excluded.vms'),
  groupOfMark: db.prepare(`INSERT INTO vpg VALUES ($site, $vpg, $vms) ON CONFLICT (site, name) DO UPDATE SET vms = excluded.vms
    WHERE vms <> excluded.vms AND NOT EXISTS (SELECT 1 FROM checkpoint WHERE site = $site AND vpg = $vpg AND at > $at)`),
  allVpgs: db.prepare('SELECT * FROM vpg ORDER BY name, site'),
  getSeen: db.prepare('SELECT seq FROM seen WHERE site = ? AND vm = ?'),
  putSeen: db.prepare('INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT (site, vm) DO UPDATE SET seq = max(seq, excluded.seq)'),
  addCheckpoint: db.prepare('INSERT OR IGNORE INTO checkpoint (site, vpg, id, at, kind, tag, vms, missing) VALUES (?, ?, ?, ?, ?, ?, ?, ?)'),
  addMark: db.prepare('INSERT OR IGNORE INTO mark (site, vm, id, epoch, named) VALUES (?, ?, ?, ?, ?)'),
  countDown: db.prepare('UPDATE checkpoint SET missing = missing - 1 WHERE site = ? AND vpg = ? AND at = ? AND id = ? RETURNING missing'),
  dropPending: db.prepare('DELETE FROM checkpoint INDEXED BY checkpoint_pending WHERE site = ? AND vpg = ? AND at < ? AND missing > 0'),
  judge: db.prepare('UPDATE mark SET judged = ? WHERE judged = 0 AND site = ? AND vm = ? AND epoch = ? AND named BETWEEN ? AND ?'),
  validDescending: db.prepare(`SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND at <= ? AND missing = 0 AND ${WHOLE} ORDER BY at DESC`),
  byId: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND id = ?'),
  list: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND at BETWEEN ? AND ? ORDER BY at DESC LIMIT ?'),
  count: db.prepare('SELECT count(*) AS valid, min(at) AS oldest FROM checkpoint WHERE site = ? AND vpg = ? AND missing = 0'),
  byIdAnywhere: db.prepare('SELECT * FROM checkpoint INDEXED BY checkpoint_by_id WHERE site = ? AND id = ?'),
  ascending: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND at >= ? AND at < ? AND missing = 0 ORDER BY at, id LIMIT ?'),
  validAscending: db.prepare(`SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND missing = 0 AND ${WHOLE} ORDER BY at, id`),
  marksDescending: db.prepare(`SELECT id FROM mark WHERE site = ? AND vm = ? AND named <= ? AND judged <> ${SUSPECT} AND ${NOT_DAMAGED} ORDER BY named DESC`),
  marksAscending: db.prepare(`SELECT id FROM mark WHERE site = ? AND vm = ? AND named >= ? AND judged <> ${SUSPECT} AND ${NOT_DAMAGED} ORDER BY named`),
  addSync: db.prepare('INSERT OR IGNORE INTO sync VALUES (?, ?, ?)'),
  dropSync: db.prepare('DELETE FROM sync WHERE site = ? AND vm = ?'),
  addBeforeSync: db.prepare(`INSERT OR IGNORE INTO before_sync (site, vm, seq, tag) SELECT $site, $vm, $seq, $tag
    WHERE NOT EXISTS (SELECT 1 FROM before_sync WHERE site = $site AND vm = $vm AND ended = 0)`),
  doubtBeforeSync: db.prepare('UPDATE before_sync SET changed = 1 WHERE site = ? AND vm = ? AND ended = 0'),
  endBeforeSync: db.prepare('UPDATE before_sync SET ended = 1 WHERE site = ? AND vm = ?'),
  dropUnchanged: db.prepare('DELETE FROM before_sync WHERE site = ? AND vm = ? AND changed = 0 AND ended = 1'),
  beforeSyncs: db.prepare('SELECT * FROM before_sync WHERE site = ? AND vm = ? ORDER BY seq'),
  dropBeforeSync: db.prepare('DELETE FROM before_sync WHERE site = ? AND vm = ? AND seq = ?'),
  dropBeforeSyncsBelow: db.prepare('DELETE FROM before_sync WHERE site = ? AND vm = ? AND seq < ?'),
  dropBeforeSyncs: db.prepare('DELETE FROM before_sync WHERE site = ? AND vm = ?'),
  getSync: db.prepare('SELECT since_seq FROM sync WHERE site = ? AND vm = ?'),
  setTag: db.prepare('UPDATE checkpoint SET tag = ? WHERE site = ? AND vpg = ? AND id = ? AND tag IS NULL'),
  countWith: db.prepare('SELECT count(*) AS count FROM mark WHERE site = ? AND vm = ?'),
  dropSeen: db.prepare('DELETE FROM seen WHERE site = ? AND vm = ?'),
  dropVpg: db.prepare('DELETE FROM vpg WHERE site = ? AND name = ?'),
  dropDamage: db.prepare('DELETE FROM damage WHERE site = ? AND vm = ?'),
  addDamage: db.prepare('INSERT OR IGNORE INTO damage VALUES (?, ?, ?, ?)'),
  namedFrom: db.prepare('SELECT named FROM mark WHERE site = ? AND vm = ? AND named >= ? ORDER BY named'),
  isDamaged: db.prepare(`SELECT 1 FROM damage CROSS JOIN mark ON mark.site = damage.site AND mark.vm = damage.vm WHERE damage.site = ? AND mark.id = ? AND mark.named >= from_seq AND mark.named < to_seq LIMIT 1`),
  damagedOf: db.prepare(`SELECT DISTINCT checkpoint.id, checkpoint.at, checkpoint.vpg FROM damage CROSS JOIN mark ON mark.site = damage.site AND mark.vm = damage.vm AND mark.named >= from_seq AND mark.named < to_seq
    JOIN checkpoint ON checkpoint.site = mark.site AND checkpoint.id = mark.id AND checkpoint.missing = 0 WHERE damage.site = $site AND damage.vm = $vm ORDER BY checkpoint.at, checkpoint.id`),
  marksBelow: db.prepare('SELECT id FROM mark WHERE site = ? AND vm = ? AND named < ? ORDER BY named LIMIT ?'),
  dropMark: db.prepare('DELETE FROM mark WHERE site = ? AND vm = ? AND id = ?'),
  dropCheckpoint: db.prepare('DELETE FROM checkpoint WHERE site = ? AND vpg = ? AND at = ? AND id = ?'),
  getMark: db.prepare('SELECT named, judged FROM mark WHERE site = ? AND vm = ? AND id = ?'),
})
