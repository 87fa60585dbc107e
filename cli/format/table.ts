import { styleText } from 'node:util'

export type Style = Parameters<typeof styleText>[0]
export type Cell = string | { text: string; style: Style }
export type Column = { title: string; align?: 'left' | 'right' }

/** Colours only where somebody looks at a terminal. */
export type Painter = (style: Style, text: string) => string
export const painter = (color: boolean): Painter => (color ? (style, text) => styleText(style, text, { validateStream: false }) : (_style, text) => text)

/** Rows below their titles, two spaces apart, nothing drawn; widths are those of the plain text. */
export const formatTable = (columns: Column[], rows: Cell[][], paint: Painter, indent = ''): string => {
  const plain = (cell: Cell | undefined): string => (cell === undefined ? '' : typeof cell === 'string' ? cell : cell.text)
  const widths = columns.map((column, index) => Math.max(column.title.length, ...rows.map((row) => plain(row[index]).length)))
  const line = (cells: Cell[]): string => {
    const parts = columns.map((column, index) => {
      const cell = cells[index]
      const text = plain(cell)
      const gap = ' '.repeat((widths[index] ?? 0) - text.length)
      const shown = cell !== undefined && typeof cell !== 'string' ? paint(cell.style, text) : text
      return column.align === 'right' ? gap + shown : shown + (index === columns.length - 1 ? '' : gap)
    })
    return `${indent}${parts.join('  ').trimEnd()}\n`
  }
  return line(columns.map((column) => ({ text: column.title, style: 'dim' }))) + rows.map(line).join('')
}
