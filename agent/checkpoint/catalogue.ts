import { DatabaseSync } from 'node:sqlite'
import type { CheckpointKind, CheckpointMark } from '../../core/record/index.ts'

export type CheckpointState = 'pending' | 'valid' | 'proved' | 'suspect'

/** A checkpoint of a VPG. `namedSeqs`: per VM id the sequence up to which its journal is replayed. */
export type CatalogueEntry = { id: string; atUnixMs: number; kind: CheckpointKind; tag?: string; state: CheckpointState; vms: string[]; namedSeqs: Record<string, number> }

export type VpgEntry = { siteId: string; name: string; vms: string[] }

const SCHEMA = `
  PRAGMA journal_mode = WAL;
  PRAGMA synchronous = NORMAL;
  CREATE TABLE IF NOT EXISTS vpg (site TEXT, name TEXT, vms TEXT, PRIMARY KEY (site, name)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS checkpoint (site TEXT, vpg TEXT, id TEXT, at INTEGER, kind TEXT, tag TEXT, vms TEXT, missing INTEGER,
    PRIMARY KEY (site, vpg, at, id)) WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS mark (site TEXT, vm TEXT, id TEXT, epoch INTEGER, named INTEGER, judged INTEGER DEFAULT 0, PRIMARY KEY (site, vm, id)) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS mark_unjudged ON mark (site, vm, epoch, named) WHERE judged = 0;
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
      this.#db.exec('ROLLBACK')
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
    return true
  }

  /** A comparison of QEMU's counters with the captured bytes, up to `upToSeq` of this epoch. */
  noteProof(siteId: string, vm: string, epoch: number, upToSeq: number, ok: boolean): void {
    this.#statements.judge.run(ok ? PROVED : SUSPECT, siteId, vm, epoch, upToSeq)
  }

  /** The newest checkpoint that is valid or proved, or undefined. Suspect ones are not offered. */
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

  count(siteId: string, vpg: string): { valid: number; oldestAtUnixMs?: number } {
    const { valid, oldest } = this.#statements.count.get(siteId, vpg) as Row
    return { valid: Number(valid), ...(oldest === null ? {} : { oldestAtUnixMs: Number(oldest) }) }
  }

  [Symbol.dispose](): void {
    if (this.#db.isOpen) this.#db.close()
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
    const state = row.missing !== 0 ? 'pending' : suspect ? 'suspect' : proved === vms.length ? 'proved' : 'valid'
    return { id: String(row.id), atUnixMs: Number(row.at), kind: row.kind as CheckpointKind, ...(row.tag === null ? {} : { tag: String(row.tag) }), state, vms, namedSeqs }
  }
}

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
  dropPending: db.prepare('DELETE FROM checkpoint WHERE site = ? AND vpg = ? AND at < ? AND missing > 0'),
  judge: db.prepare('UPDATE mark SET judged = ? WHERE judged = 0 AND site = ? AND vm = ? AND epoch = ? AND named <= ?'),
  validDescending: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND at <= ? AND missing = 0 ORDER BY at DESC'),
  byId: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND id = ?'),
  list: db.prepare('SELECT * FROM checkpoint WHERE site = ? AND vpg = ? AND at BETWEEN ? AND ? ORDER BY at DESC LIMIT ?'),
  count: db.prepare('SELECT count(*) AS valid, min(at) AS oldest FROM checkpoint WHERE site = ? AND vpg = ? AND missing = 0'),
  getMark: db.prepare('SELECT named, judged FROM mark WHERE site = ? AND vm = ? AND id = ?'),
})
