"""Detection of pages without content: bot checks, error pages and consent banners.

Short pages are checked sentence by sentence. A page fails if hardly any text remains after removing
the sentences of bot checks, error pages, and requests for cookies or scripts.
"""

import re

import regex

_MAX_SHORT_CHARS = 4000  # longer pages are assumed to have content
# A page with such a sentence needs at least this many letters of other text.
_MIN_REFUSAL_LETTERS = 120
_MIN_NOTICE_LETTERS = 25
_REFUSED = "the page is a bot check or an error page"
_MIN_TITLE_LETTERS = 20  # for a refusal that may also be the title of a work

_TITLE = regex.compile(
    r"^\W*(?:forbidden|page not found|not found|error|access denied|just a moment|un instant"
    r"|un momento|um momento)\W*$",
    regex.IGNORECASE,
)
_REFUSAL = regex.compile(
    r"checking (?:your browser|if the site connection)"
    r"|you(?:.re| are) (?:a |not a )?human|robot or human|are you a (?:robot|human)"
    r"|not a (?:ro)?bot\b"
    r"|enable javascript and cookies|review the security of your connection|security checkpoint"
    r"|(?:verify|verifying|check|checking) your browser"
    r"|performance (?:&|and) security by|\bray id\b|\battention required|\bincident id\b"
    r"|(?:complete|solve|pass|enter|requir\w+) (?:the |a |this )?(?:security check|captcha)"
    r"|^\W*captcha (?:check|verification|challenge|required)(?: required)?\W*$|human verification"
    r"|^\W*security check\W*$"
    r"|bot (?:detection|verification)|request unsuccessful|ddos protection by"
    r"|unusual (?:traffic|activity) from your|access (?:to this \S+ )?(?:has been|is"
    r"|was) denied(?! to)"
    r"|access to this \S+ denied|^\W*access denied\W{1,3}(?:\w+\W){0,3}(?:firewall|security|error)"
    r"|too many requests(?: from|\W*$)|rate.?limited(?: by|\W*$)"
    r"|^\W*error (?:code\W{1,2})?1\d{3}\W*$"
    r"|account (?:has been |is |was )?suspended\W*$|contact your hosting provider"
    r"|enable js and disable|(?:disable|pause|turn off) (?:any |your |the )?ad.?block"
    r"|requested url (?:was|is) (?:rejected|not found)|consult with your administrator"
    r"|^\W*(?:\w{2,6}\W{1,3})?something went wrong\W*$"
    r"|slide (?:right |the \w+ )?to (?:verify|unlock)\W*$"
    r"|^\W*client challenge\W*$|\bserver at \S{1,99} port \d"
    r"|(?:you have|have i|access has|you were|ip \S+ has) (?:been )?blocked|pardon our interruption"
    r"|security (?:service|solution) to protect itself|triggered the security solution"
    r"|could trigger this block|you are unable to access|email the site owner"
    r"|(?:do not|don.t) have permission to (?:access|view)"
    r"|made us think (?:that )?you (?:were|are) a bot"
    r"|^\W*(?:error |http ){0,2}(?:40[134]|429|50[0234])\W*$"
    r"|^\W*(?:error |http )?(?:40[134]|429|50[0234])[\W\d]{0,4}(?:forbidden|unauthori.ed|not found"
    r"|too many|internal|bad gateway|service|gateway|access|page|error)"
    r"|^\W*(?:bad gateway|service unavailable)\W*$"
    r"|page (?:that )?(?:you.re|you are|you were|you) (?:looking for|requested)"
    r"|before you continue to (?:google|youtube)|the yahoo family of brands"
    r"|nur einen moment|einen moment,? bitte|sicherheitsüberprüfung|zugriff verweigert"
    r"|accès refusé|vérification de (?:la )?sécurité|vérifi\w+ que vous êtes|acceso denegado"
    r"|acesso negado|verifica\w* (?:que|se) (?:usted|você) (?:es|é)"
    r"|^\W*подождите|доступ (?:запрещ|ограничен)|вы не робот|проверк\w+ (?:браузера|безопасности)"
    r"|^\W*请稍[候等]|人机验证|安全验证|完成验证|正在验证|访问(?:被拒绝|受限)|输入验证码|輸入驗證碼"
    r"|访问过于频繁|請求過於頻繁|请求过于频繁|滑动验证|滑動驗證|拖动滑块|拒絕存取|^\W*(?:しばらく|少々)お待ちください|ロボットではありません|アクセスが拒否"
    r"|^\W*잠시만 기다|로봇이 아닙니다|접근이 (?:거부|차단)",
    regex.IGNORECASE,
)
_NOTICE = regex.compile(
    r"\b(?:we|our|us|you|your|this|site|website|accept|allow|by|please)\b.{0,99}\bcookies?\b"
    r"|\bcookies?\b.{0,40}\b(?:policy|settings|preferences|consent|notice)\b"
    r"|(?:enable|activ\w+|aktiv\w+|turn on|requires?|need\w*) .{0,60}javascript"
    r"|javascript .{0,40}(?:enabled|disabled|required|supported|turned off|available)"
    r"|your (?:privacy|consent|choices)|privacy policy|personali[sz]ed (?:ads|content)"
    r"|legitimate interest|(?:our|and) (?:\d+ )?partners"
    r"|^\W*(?:accept|reject|allow|agree|manage|more)(?: \w+){0,3}\W*$"
    r"|^\W*(?:sign|log) (?:in|up|out)\W*$|^\W*(?:skip to \w+(?: content)?|menu|search|share)\W*$"
    r"|terms of (?:use|service)|^\W*before you continue|all rights reserved|^\W*loading\W*$"
    r"|^\W*please wait|^\W*redirecting|datenschutz|zustimmen|einwilligung|confidentialité"
    r""
    # Other languages: a pronoun or a verb of a banner with "cookies", button labels, scripts.
    r"|\b(?:wir|unsere?|diese|durch|ihre?[mnr]?|nous|notre|nos|votre|vos|ce site|utilizamos|usamos"
    r"|este sitio|esta (?:web|p[aá]gina)|nuestr\w+|este site|nosso|utilizziamo|questo sito|мы"
    r"|наш\w*"
    r"|сайт\w*|использу\w+|продолжая)\b.{0,99}\b(?:cookies?|куки)\b"
    r"|\b(?:cookies?|куки)\b.{0,60}\b(?:akzeptier\w+|ablehnen|zulassen|verwende[nt]|accepter"
    r"|refuser|aceptar|rechazar|configurar|propias|terceros|использу\w+|принять)\b"
    r"|^\W*(?:alles? |nur |mehr |tout |j.|en |continuer |rechazar |принять |отклонить )?"
    r"(?:akzeptieren|ablehnen|zulassen|notwendige|einstellungen|erfahren|accept\w{0,4}|refuse\w?"
    r"|savoir plus"
    r"|personnaliser|paramétrer|sans accepter|acept(?:ar|o)|rechazar|configurar|más información"
    r"|принять|принимаю|согласен|отклонить|понятно|хорошо|подробнее|настро(?:йки|ить))"
    r"(?: \w+){0,2}\W*$"
    r"|website zu verbessern|stimmen sie.{0,99}\bzu\b|vous acceptez|acepta su uso|вы соглашаетесь"
    r"|javascript.{0,20}(?:启用|啟用|开启|開啟|禁用|停用|关闭|有効|無効|必要|사용|활성|필요)"
    r"|(?:启用|啟用|开启|開啟|打开|需要|允许|有効).{0,12}javascript"
    r"|隐私政策|クッキー|쿠키|接受所有|файл\w* cookie",
    regex.IGNORECASE,
)
# A full stop inside a word does not end a sentence.
_SENTENCE = re.compile(
    "[^\n.!?\u2026\u3002\uff01\uff1f]+(?:[.](?=\\w)[^\n.!?\u2026\u3002\uff01\uff1f]+)*"
)
_IMAGE = re.compile(r"!\[[^\]\n]{0,500}\]\([^)\s]{0,500}\)")
_ADDRESS = re.compile(r"\]\([^)\s]{0,500}\)|https?://\S{1,500}|\bwww\.\S{1,300}")
_LETTER = re.compile(r"[^\W_]")  # or a digit
_WIDE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")


def missing_content(page: str) -> str | None:
    """Return why a page (plain text or Markdown) has no content, or None if it has some."""
    if len(page) > _MAX_SHORT_CHARS:
        return None if _LETTER.search(page) else "the page has no text"
    text = _ADDRESS.sub(" ", _IMAGE.sub(" ", page))
    num_refusals = num_titles = num_notices = num_removed = 0
    remaining = []
    for sentence in _SENTENCE.findall(text):
        is_refusal = bool(_REFUSAL.search(sentence))
        is_title = not is_refusal and bool(_TITLE.search(sentence))
        if is_refusal or is_title or _NOTICE.search(sentence):
            num_refusals, num_titles = num_refusals + is_refusal, num_titles + is_title
            num_notices += not (is_refusal or is_title)
            num_removed += _count_letters(sentence)
        else:
            remaining.append(sentence)
    num_letters = _count_letters(" ".join(remaining))
    if num_refusals and num_letters < _MIN_REFUSAL_LETTERS:
        return _REFUSED
    if num_titles and num_letters < _MIN_TITLE_LETTERS:
        return _REFUSED
    is_mostly_notices = num_notices > 2 and num_letters * 2 < num_removed
    if num_notices and (num_letters < _MIN_NOTICE_LETTERS or is_mostly_notices):
        return "the page only asks for cookies, scripts or consent"
    return None if num_letters else "the page has no text"


def _count_letters(text: str) -> int:
    """Count letters and digits; a Chinese, Japanese or Korean letter counts as four."""
    return len(_LETTER.findall(text)) + 3 * len(_WIDE.findall(text))
